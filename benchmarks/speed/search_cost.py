#!/usr/bin/env python3
"""LLM-FP4's search beside GPTQ's solve on the same linears: seconds, operations called, and the error that is left.

    python benchmarks/speed/search_cost.py MODEL --calib c4.txt@0:0.8 --samples 8 --seqlen 512 --blocks 0 15 29

Every linear of the named blocks gets the statistics of its inputs in the full-precision model, once for both. CPU
seconds are those of the process, which other programs on the machine do not lengthen as they do wall time. A called
operation is about one kernel on a GPU; one that copies to the host waits for all before it. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from calib.data.tokens import load_calibration
from calib.precision import product, strict_float32
from calib.stats import GroupStatistics, Stat, StatisticsAccumulator
from ptq.methods import find_method, make_config
from ptq.methods.base import LayerMethod

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq int4": ("gptq", {"bits": 4, "group_size": None}, {}),
    "gptq e2m1": ("gptq", {"bits": 4, "group_size": None, "format": "e2m1"}, {}),
    "W4A4": ("llm-fp4", {"bits": 4, "group_size": None, "format": "e2m1", "act_format": "e2m1-shifted"}, {}),
    "W4A8": ("llm-fp4", {"bits": 4, "group_size": None, "format": "e2m1", "act_format": "e4m3-shifted"}, {}),
    "W4A16": ("llm-fp4", {"bits": 4, "group_size": None, "format": "e2m1"}, {}),
}
_NO_KERNEL = (
    "view",
    "slice",
    "select",
    "transpose",
    "t.",
    "expand",
    "unsqueeze",
    "detach",
    "alias",
    "reshape",
    "empty",
)
_TO_HOST = ("_local_scalar_dense", "nonzero")


class Counter(TorchDispatchMode):
    """Counts operations as they are called, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").removeprefix("prims.")
        if not name.startswith(_NO_KERNEL):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def record(self) -> dict[str, int]:
        host = sum(count for name, count in self.names.items() if name.startswith(_TO_HOST))
        return {"operations": self.names.total(), "waits for the host": host}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    totals: dict[str, dict[str, float]] = {name: collections.defaultdict(float) for name in options.methods}
    layers = []
    with torch.no_grad(), strict_float32():
        for stats, weights in groups(options):
            for name in options.methods:
                for linear, weight in weights.items():
                    found = measured(name, weight, stats, linear)
                    layers.append({"method": name, "linear": linear, **found})
                    for key in ("cpu seconds", "seconds", "operations", "waits for the host"):
                        totals[name][key] += found[key]
                    totals[name]["log loss"] += math.log(found["loss"]) if found["loss"] else 0.0
    base = totals[options.methods[0]]["cpu seconds"]
    for total in totals.values():
        total[f"times {options.methods[0]}"] = total["cpu seconds"] / base
    command = {"blocks": options.blocks, "tokens": [options.samples, options.seqlen], "threads": options.threads}
    print(json.dumps({"record": "search-cost", "command": command, "totals": totals, "layers": layers}, indent=1))


def measured(name: str, weight: Tensor, stats: GroupStatistics, linear: str) -> dict[str, Any]:
    """One linear by one method: timed once without counting, then counted."""
    method, fields, options = METHODS[name]
    record = find_method(method)
    assert isinstance(record, LayerMethod)
    scheme, config = ptq.Scheme(symmetric=True, **fields), make_config(record, options)

    def solve() -> Any:
        own = GroupStatistics(stats.tokens, stats.sequences, stats.moments, ranges=stats.ranges, samples=stats.samples)
        return record.quantize(weight, own.of(linear), scheme, config)

    cpu, wall = time.process_time(), time.perf_counter()
    result = solve()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    with Counter() as counter:
        solve()
    loss = relative_error(weight, result.weight, stats) if result.losses is None else result.losses()[1]
    scheme = result.weight.scheme
    formats = {"format": scheme.format, "act_format": scheme.act_format, "rounds": result.figures.get("rounds")}
    return {"cpu seconds": cpu, "seconds": wall, "loss": loss, **formats, **counter.record()}


def relative_error(weight: Tensor, quantized: Any, stats: GroupStatistics) -> float:
    """The output error of a quantized weight for inputs as they are, relative to the output."""
    assert stats.moments is not None
    error = quantized.dequantize(torch.float32) - weight
    found, whole = ((product(one, stats.moments.hessian) * one).sum(dtype=torch.float64) for one in (error, weight))
    return float(found / whole)


def groups(options: argparse.Namespace) -> Iterator[tuple[GroupStatistics, dict[str, Tensor]]]:
    """Statistics of every input group of the blocks, with the weights that read it, float32."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True).eval()
    tokens = load_calibration(options.calib, tokenizer, samples=options.samples, seqlen=options.seqlen, seed=0).tokens
    inputs: dict[str, Tensor] = {}
    parts = tuple(f".layers.{block}." for block in options.blocks)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in f".{name}" for part in parts)
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(_keep(inputs, name))
    model.model(tokens)
    needs = frozenset({Stat.HESSIAN, Stat.RANGES, Stat.SAMPLES})  # of LLM-FP4; GPTQ needs the first
    for name, seen in inputs.items():
        alike = [other for other, tensor in inputs.items() if tensor is seen]
        if alike[0] != name:
            continue
        weights = {other: linears[other].weight.detach() for other in alike}
        accumulator = StatisticsAccumulator(name, weights, needs)
        accumulator.add(seen, None)
        yield accumulator.finish(), {other: weight.float() for other, weight in weights.items()}


def _keep(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        inputs[name] = args[0]

    return hook


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the measure")
    return parser.parse_args()


if __name__ == "__main__":
    main()

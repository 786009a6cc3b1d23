#!/usr/bin/env python3
"""Tokens per second of a whole model, packed against bfloat16: the path of `ptq bench generate`, on random weights.

    python benchmarks/speed/generation.py --formats bf16,itq3s,int4g128 --prompts 128,2048 --out generation.jsonl

A model of the shapes is made on the device, measured, and its blocks' linears are replaced by packed ones, format after
format. Every figure has the same static cache and a captured step. ``--also`` adds the same without merged products
(``separate``), without the graph (``eager``), or compiled (``compiled``). Each result is a line of JSON at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from large_model import COMMON, SHAPES
from random_weights import random_linear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from calib.data import static_sampling
from evals.inference.speed import measure_generation
from ptq.integration.swap import share_inputs
from ptq.runtime.benchmark import parse_format
from ptq.runtime.chosen import kernel_line
from ptq.runtime.linear import QuantLinear

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "vocab_size": 1000,
}
START = time.monotonic()


def make_model(shapes: str, layers: int, device: torch.device) -> Any:
    """A random model in bfloat16."""
    values = (SHAPES | {"tiny": TINY})[shapes]
    common = COMMON if shapes != "tiny" else COMMON | {"num_key_value_heads": 1}
    config = AutoConfig.for_model(**values, **common, num_hidden_layers=layers)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def pack(model: Any, name: str) -> None:
    """Replace all linears of the blocks."""
    scheme, device = parse_format(name), model.device
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    for number, (path, linear) in enumerate(linears):
        owner, _, leaf = path.rpartition(".")
        new = random_linear(scheme, linear.out_features, linear.in_features, number, device)
        setattr(model.get_submodule(owner), leaf, new)
    share_inputs(model)


def measure(model: Any, prompt: int, new: int, variant: str) -> dict[str, Any]:
    """A row of figures; ``variant`` as in the module's docstring."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    captures = static_sampling._cuda_graph
    if variant == "eager":
        static_sampling._cuda_graph = _refuse
    try:
        speed = measure_generation(model, prompt, new, compiled=variant == "compiled")
    finally:
        static_sampling._cuda_graph = captures
    merged = sum(linear.merged is not None for linear in linears)
    return {
        "prompt": prompt,
        "new": new,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "ms_per_token": round(1e3 / speed.tokens_per_second, 3),
        "first_token_ms": round(1e3 * speed.first_token_seconds, 2),
        "weight_gb": round(speed.weight_bytes / 1e9, 3),
        "peak_gb": round(speed.peak_bytes / 1e9, 3),
        "held_gb": round(_held(model) / 1e9, 3),
        "captured": speed.captured,
        "why_eager": speed.eager_reason,
        "merged_linears": merged,
        "linears": len(linears),
        "gone": sum(bool(linear._gone) for linear in linears),
        "kernels": kernel_line(model),
    }


def _held(model: Any) -> int:
    gc.collect()
    if model.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _refuse(step: Any, device: torch.device) -> Any:
    raise RuntimeError("not captured, to compare")


def separate(model: Any) -> None:
    """Take the linears out of their groups."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.merged, module._groups = None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "tiny"], default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--formats", default="bf16,itq3s,int4g128")
    parser.add_argument("--prompts", default="128,2048")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--also", default="", help="eager, separate, compiled: at the first prompt length")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("generation.jsonl"))
    options = parser.parse_args()
    model = make_model(options.shapes, options.layers, torch.device(options.device))
    prompts = [int(text) for text in options.prompts.split(",")]
    dense: dict[tuple[int, str], dict[str, Any]] = {}
    with options.out.open("a") as file:
        for name in options.formats.split(","):
            if name != "bf16":
                pack(model, name)
            rows = [(prompt, "graph") for prompt in prompts]
            rows += [(prompts[0], variant) for variant in options.also.split(",") if variant]
            for prompt, variant in rows:
                try:
                    if variant == "separate":
                        separate(model)
                    row = measure(model, prompt, options.new, variant)
                    if name == "bf16":
                        dense[prompt, variant] = row
                    base = dense.get((prompt, variant)) or dense.get((prompt, "graph"))
                    if base is not None:
                        row["times_bf16"] = round(row["tokens_per_second"] / base["tokens_per_second"], 2)
                        row["first_token_of_bf16"] = round(row["first_token_ms"] / base["first_token_ms"], 2)
                except Exception as error:
                    traceback.print_exc()
                    row = {"prompt": prompt, "error": repr(error)[:400]}
                line = {"row": "generate", "at": round(time.monotonic() - START, 1), "format": name, "variant": variant}
                text = json.dumps(line | row)
                print(text, flush=True)
                file.write(text + "\n")
                file.flush()


if __name__ == "__main__":
    main()

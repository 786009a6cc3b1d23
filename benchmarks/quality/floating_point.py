#!/usr/bin/env python3
"""4-bit floating point: NVFP4 and MXFP4 by method, LLM-FP4's table in shape, and the seconds of FP8 products.

    python benchmarks/quality/floating_point.py MODEL --calib 'c4.txt@0:0.8' --wiki wikitext2-raw-test.txt \\
        --held-out 'c4.txt@0.8:1' --max-tokens 65536 --max-held-out 65536 --budget 400 --records RECORDS
    python benchmarks/quality/floating_point.py --table RECORDS

Every run leaves one JSON record and is skipped when its record is there: the same command goes on where it stopped.
Runs come in the order of their weight, seed after seed; after ``--budget`` seconds none is begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import Bench, spread
from torch import nn

import ptq
from ptq.api import make_recipe
from ptq.errors import PtqError
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme

METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn", "scales": "minmax"},
    "RTN + search": {"method": "rtn"},  # with the search of the format: four over six, or the exponent
    "GPTQ": {"method": "gptq"},
    "CoreQ": {"method": "coreq"},
}
SEARCHES = {"nvfp4": "four_over_six", "mxfp4": "mse"}
CHANNEL = {"method": "rtn", "bits": 4, "group_size": None, "scales": "minmax", "act_symmetric": True}
LLM_FP4 = {"method": "llm-fp4", "bits": 4}
PAPER: dict[str, dict[str, Any]] = {
    "LLM-FP4": LLM_FP4,
    "MinMax FP": {**LLM_FP4, "search": False, "shift": "off"},
    "searched FP": {**LLM_FP4, "shift": "off"},
    "shift alone": {**LLM_FP4, "search": False},
    "MinMax INT": CHANNEL,  # inputs per token, the stronger of the two ways
}
SIZES = (4096, 8192)


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell of a table: how and with which inputs, on which draw of the calibration text."""

    table: str
    method: str
    setting: str
    seed: int
    fields: dict[str, Any] = dataclasses.field(compare=False)

    @property
    def file(self) -> str:
        name = f"{self.table}__{self.method}__{self.setting}__{self.seed}.json"
        return name.replace(" ", "_").replace("+", "and")


def runs(seeds: list[int]) -> Iterator[Run]:
    """All cells, the most important first."""
    for seed in seeds:
        for inputs in (4, 8, 16):
            for name, fields in PAPER.items():
                yield Run("LLM-FP4", name, f"W4A{inputs}", seed, _with_inputs(fields, inputs))
            if inputs == 4:
                yield from block_runs(seed)


def block_runs(seed: int) -> Iterator[Run]:
    """NVFP4 and MXFP4, with inputs of the same format and with inputs as they are."""
    for inputs in (True, False):
        for number in ("nvfp4", "mxfp4"):
            for name, fields in METHODS.items():
                more = {"scales": SEARCHES[number]} if name == "RTN + search" else {}
                act = {"act_format": number} if inputs else {}
                setting = "W4A4" if inputs else "W4A16"
                yield Run(number.upper(), name, setting, seed, {**fields, **more, "format": number, **act})


def _with_inputs(fields: dict[str, Any], bits: int) -> dict[str, Any]:
    if fields["method"] == "rtn" and bits == 16:  # the sign of inputs that are not rounded has no effect
        return {key: value for key, value in fields.items() if key != "act_symmetric"}
    return {**fields, "act_bits": bits}


class FloatBench(Bench):
    """The full model and the machine, shared by all runs."""

    def measure(self, run: Run) -> dict[str, Any]:
        """Quantize, load and evaluate one cell."""
        recipe = make_recipe(
            {
                **run.fields,
                "calib": self.options.calib,
                "calib_samples": self.options.samples,
                "calib_seqlen": self.options.seqlen,
                "seed": run.seed,
                "compute_dtype": self.options.dtype,
                "container": "native",
            }
        )
        with tempfile.TemporaryDirectory(prefix="ptq-floating-point-") as folder:
            start = time.perf_counter()
            report = ptq.quantize(self.options.model, recipe, out=folder, device=str(self.device))
            seconds = time.perf_counter() - start
            model = ptq.load(folder, dtype=self.dtype).to(self.device).eval()
            result = self.evaluate(model)
        return {
            "cell": dataclasses.asdict(run),
            "bits_per_weight": report.totals["bits_per_weight"],
            "seconds": seconds,
            "timing": report.timing,
            "losses": {layer.name: layer.loss for layer in report.layers},
            "schemes": sorted({layer.scheme["name"] for layer in report.layers}),
            "recipe": report.recipe,
            "calibration": report.calibration,
            "environment": dict(report.environment) | {"platform": platform.platform(), "eval_dtype": str(self.dtype)},
            **result,
        }


@torch.no_grad()
def measure_products(device: torch.device, sizes: tuple[int, ...], repeats: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of a linear with dense bfloat16 weights and of the same one in FP8, inputs rounded per token."""
    rows = []
    for size in sizes:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=generator)
        dense = nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16)
        packed = _fp8_linear(dense)
        difference = (packed(x).float() - dense(x).float()).square().mean() / dense(x).float().square().mean()
        times = {name: _milliseconds(layer, x, repeats) for name, layer in (("bf16", dense), ("fp8", packed))}
        rows.append({"size": size, **times, "relative_error": float(difference), "kernel": packed.kernel_name(x)})
    return rows


def _fp8_linear(dense: nn.Linear) -> QuantLinear:
    from ptq.quantized import QuantizedWeight

    scheme = Scheme.of("fp8", act_format="fp8", scale_dtype="bfloat16")
    record = scheme.number_format
    weight = dense.weight.detach().float()
    grid = record.grid(record.fit(weight, scheme, "minmax"), scheme, weight.shape[1])
    return QuantLinear.from_quantized(QuantizedWeight.from_grid(grid.round(weight), grid, scheme))


def _milliseconds(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """The median of several calls, after warming up."""
    found = []
    with torch.no_grad():
        for index in range(repeats + 3):
            if x.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if index >= 3:
                found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    options = parse()
    records = Path(options.table or options.records)
    if options.table:
        print(table(records))
        return
    records.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    bench = FloatBench(options)
    products = records / "products.json"
    if not products.exists():
        sizes = tuple(options.sizes)
        _write(products, {"device": str(bench.device), "rows": measure_products(bench.device, sizes)})
    for run in runs(options.seeds):
        target = records / run.file
        if target.exists() or (options.only and not any(word in run.file for word in options.only)):
            continue
        if time.perf_counter() - begun > options.budget:
            print("the budget is spent; the same command goes on", file=sys.stderr)
            return
        try:
            record = bench.measure(run)
        except PtqError as error:
            print(f"{run.file}: {error}", file=sys.stderr, flush=True)
            continue
        _write(target, record)
        kl = record["divergence"]["kl_mean"]
        print(
            f"{run.file}: wiki {record['wiki']:.2f} KL {kl:.4f} {record['seconds']:.0f} s", file=sys.stderr, flush=True
        )


def _write(target: Path, record: dict[str, Any]) -> None:
    half = target.with_suffix(".half")
    half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    half.replace(target)


def table(folder: Path) -> str:
    """Markdown: a block per table and setting, a row per method; mean and standard deviation over seeds."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*__*.json"))]
    lines: list[str] = []
    for name, setting in dict.fromkeys((r["cell"]["table"], r["cell"]["setting"]) for r in records):
        rows = [r for r in records if (r["cell"]["table"], r["cell"]["setting"]) == (name, setting)]
        lines += [
            f"\n**{name} {setting}**, full model {rows[0]['wiki_base']:.2f}\n",
            "| method | bits per weight | WikiText-2 | held-out | KL to the full model | solve s | seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in [*PAPER, *METHODS]:
            same = [r for r in rows if r["cell"]["method"] == method]
            if same:
                columns = [
                    f"{same[0]['bits_per_weight']:.3f}",
                    spread([r["wiki"] for r in same], 2),
                    spread([math.exp(statistics.fmean(r["held_out_segment_nll"])) for r in same], 2),
                    spread([r["divergence"]["kl_mean"] for r in same], 4),
                    spread([r["timing"].get("solve", 0.0) for r in same], 1),
                    str(len(same)),
                ]
                lines.append(f"| {method} | {' | '.join(columns)} |")
    products = folder / "products.json"
    if products.exists():
        lines += ["\n**Products of size n x n x n, ms**\n", "| n | bfloat16 | FP8 | kernel |", "|---|---|---|---|"]
        rows = json.loads(products.read_text())["rows"]
        lines += [f"| {row['size']} | {row['bf16']:.3f} | {row['fp8']:.3f} | {row['kernel']} |" for row in rows]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face folder or a hub id")
    parser.add_argument("--table", metavar="RECORDS", help="print the records of a folder as a table, and stop")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--wiki", default="wikitext2", help="the text for perplexity and KL")
    parser.add_argument("--held-out", default="c4", help="the text to rank by")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of the first text; default all")
    parser.add_argument("--max-held-out", type=int, help="of the second text; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="runs whose file name has one of these words")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="of the products that are timed")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no run is begun")
    parser.add_argument("--dtype", default="auto", help="of the passes while quantizing")
    parser.add_argument("--eval-dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", default="records", help="folder for the records")
    options = parser.parse_args()
    if not options.table and not options.model:
        parser.error("MODEL is required")
    return options


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How far a run is from the machine's limit: seconds over those of its counted operations, and forecast over fact.

    python benchmarks/speed/efficiency.py MODEL --calib c4.txt@0:0.8 --method coreq --samples 32 --seqlen 512

The limit is the time that the operations in the report take at the rates of this machine's own matrix products,
measured in the same process before and after: passes at the rate of their dtype, solves at the float32 rate,
statistics (exact products of bfloat16 numbers with float32 results) at the bfloat16 rate and, less strictly, at the
best rate that PyTorch has for such a product. The forecast is made in a process of its own, so that its peak is not
the run's. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ptq
from calib.precision import product, product_t, strict_float32
from ptq.pipeline.preparation.preflight import peak_memory


def main() -> None:
    options = parse()
    if options.forecast:
        print(json.dumps(ptq.forecast(options.model, **arguments(options, "unused")).to_dict()))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--forecast"]
    forecast = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    before = rates()
    with tempfile.TemporaryDirectory(prefix="ptq-efficiency-") as folder:
        start = time.perf_counter()
        report = ptq.quantize(options.model, **arguments(options, folder))
        seconds = time.perf_counter() - start
    after = rates()
    rate = {name: max(before[name], after[name]) for name in before}
    print(json.dumps(record(options, report, seconds, rate, forecast), indent=1))


def arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "method": options.method,
        "bits": 3,
        "group_size": 64,
        "calib": options.calib,
        "calib_samples": options.samples,
        "calib_seqlen": options.seqlen,
        "device": "cpu",
        "out": f"{folder}/out",
    }


def record(
    options: argparse.Namespace, report: ptq.Report, seconds: float, rate: dict[str, float], forecast: dict[str, Any]
) -> dict[str, Any]:
    flops = report.environment["flops"]
    passes = rate["bfloat16" if report.environment["pass_dtype"] == "bfloat16" else "float32"]
    common = flops["passes"] / passes + flops["solve"] / rate["float32"]
    strict, usual = (common + flops["statistics"] / rate[name] for name in ("bfloat16", "bfloat16 to float32"))
    peak = peak_memory()
    return {
        "record": "ptq-efficiency",
        "command": {"method": options.method, "calib": options.calib, "tokens": [options.samples, options.seqlen]},
        "seconds": seconds,
        "timing": report.timing,
        "flops": flops,
        "rates": rate,
        "seconds_at_rates": {"strict": strict, "statistics at PyTorch's rate": usual},
        "ratio": {"strict": seconds / strict, "statistics at PyTorch's rate": seconds / usual},
        "peak_memory": peak,
        "forecast": {name: forecast[name] for name in ("seconds", "peak_memory", "timing", "file_bytes")},
        "forecast_over_fact": {
            "seconds": forecast["seconds"] / report.totals["seconds"],
            "peak_memory": forecast["peak_memory"] / report.environment["peak_memory"],
            "file_bytes": forecast["file_bytes"] / report.totals["file_bytes"],
        },
        "environment": report.environment,
    }


def rates(size: int = 1536, tokens: int = 4096) -> dict[str, float]:
    """Floating-point operations a second of products ``[size, tokens] [tokens, size]``, medians of ten."""
    a, b = (torch.randn(tokens, size).bfloat16() for _ in range(2))
    a32, b32 = a.float().T.contiguous(), b.float()
    work: dict[str, Callable[[], Tensor]] = {
        "bfloat16": lambda: a.T @ b,
        "bfloat16 to float32": lambda: product_t(a, b),
        "float32": lambda: product(a32, b32),
    }
    with strict_float32():
        return {name: 2 * tokens * size * size / median_seconds(run) for name, run in work.items()}


def median_seconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(11):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--method", default="coreq")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--forecast", action="store_true", help="only print the forecast")
    return parser.parse_args()


if __name__ == "__main__":
    main()

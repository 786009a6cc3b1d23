#!/usr/bin/env python3
"""Seconds of one quantization, by part of the work.

    python benchmarks/speed/seconds.py MODEL --calib c4.txt --samples 64 --seqlen 512 --method coreq

Beside the seconds stand the matrix-multiplication rates of this machine, measured in the same process, in float32 and
bfloat16. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch

import ptq
from ptq.api import make_recipe, resolve_device


def main() -> None:
    options = parse()
    device = resolve_device(options.device)
    results = []
    for scales in ("pnorm", "minmax"):
        for _ in range(options.repeat + 1):  # the first one warms up
            results.append({"scales": scales, **run(options, scales)})
    runs = [r for i, r in enumerate(results) if i % (options.repeat + 1)]
    summary = {
        scales: statistics.median(r["seconds"] for r in runs if r["scales"] == scales) for scales in ("pnorm", "minmax")
    }
    rates = {str(dtype): rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(json.dumps({"median_seconds": summary, "flops_per_second": rates, "runs": runs}, indent=1))


def run(options: argparse.Namespace, scales: str) -> dict[str, object]:
    """One quantization into a folder that is thrown away."""
    fields = {
        "method": options.method,
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "calib": options.calib,
        "calib_samples": options.samples,
        "calib_seqlen": options.seqlen,
        "scales": scales,
        "compute_dtype": options.dtype,
    }
    with tempfile.TemporaryDirectory(prefix="ptq-seconds-") as folder:
        start = time.perf_counter()
        report = ptq.quantize(options.model, make_recipe(fields), out=folder, device=options.device)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "timing": report.timing, "environment": report.environment}


def rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of square matrix products, median of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(11):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", default="c4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--method", default="coreq")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3, help="counted runs of each kind, after one that is not")
    return parser.parse_args()


if __name__ == "__main__":
    main()

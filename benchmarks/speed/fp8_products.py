#!/usr/bin/env python3
"""Milliseconds of a linear in FP8 and of the same one in bfloat16, on a GPU that is otherwise idle.

    python benchmarks/speed/fp8_products.py --sizes 4096 8192 --rows 1 16 4096 8192 -o fp8.json

What is timed is what a user gets: the layer's forward, inputs in bfloat16, quantizing of inputs included. Each figure
is the median over repeats of the time of ten calls that are enqueued together, divided by ten. ``product`` is the
product of codes alone, ``fast`` the same with ``use_fast_accum``, ``quantize`` the quantizer of inputs alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.quantized import QuantizedWeight
from ptq.runtime.fp8_products import _quantizer
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme

CALLS = 10


def fp8_linear(dense: nn.Linear) -> QuantLinear:
    """``dense`` with weights in FP8 per channel and inputs in FP8 per token."""
    scheme = Scheme.of("fp8", act_format="fp8", scale_dtype="bfloat16")
    record = scheme.number_format
    weight = dense.weight.detach().float()
    grid = record.grid(record.fit(weight, scheme, "minmax"), scheme, weight.shape[1])
    return QuantLinear.from_quantized(QuantizedWeight.from_grid(grid.round(weight), grid, scheme))


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median over repeats, after warming up, of a call among others in a stream."""
    found = []
    for index in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            call()
        stop.record()
        torch.cuda.synchronize()
        if index >= 3:
            found.append(start.elapsed_time(stop) / CALLS)
    return statistics.median(found)


@torch.no_grad()
def measure(rows: int, size: int, repeats: int) -> dict[str, Any]:
    """One shape: inputs ``[rows, size]``, weight ``[size, size]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16, generator=generator)
    dense = nn.Linear(size, size, bias=False, device="cuda", dtype=torch.bfloat16)
    packed = fp8_linear(dense)
    expected = dense(x).float()
    quantize = _quantizer()
    codes, scale = quantize(x)
    weight, columns = packed.get_buffer("weight_packed").t(), packed.get_buffer("weight_scale").float().reshape(1, -1)

    def product(fast: bool) -> Tensor:
        return torch._scaled_mm(codes, weight, scale_a=scale, scale_b=columns, out_dtype=x.dtype, use_fast_accum=fast)

    return {
        "rows": rows,
        "size": size,
        "kernel": packed.kernel_name(x),
        "bf16": milliseconds(lambda: dense(x), repeats),
        "fp8": milliseconds(lambda: packed(x), repeats),
        "product": milliseconds(lambda: product(False), repeats),
        "fast": milliseconds(lambda: product(True), repeats),
        "quantize": milliseconds(lambda: quantize(x), repeats),
        "relative_error": float((packed(x).float() - expected).square().mean() / expected.square().mean()),
        "difference_of_fast": float((product(True).float() - product(False).float()).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "runs": [],
    }
    for size in options.sizes:
        for rows in options.rows:
            found["runs"].append(measure(rows, size, options.repeats))
            print(json.dumps(found["runs"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

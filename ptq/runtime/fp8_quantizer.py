"""Inputs to FP8 codes in one kernel on a GPU: the codes and scales of `TokenFp8`, without its float32 temporaries.

The eager formula reads and writes a dozen float32 tensors of the input's size, which takes longer than the product
that follows. Here a row is read once for its largest magnitude (and again, from the cache, for its codes).

It needs Triton, and Triton a C compiler; builds of torch for CPUs bring neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["quantize_rows"]

_LARGEST_BLOCK = 4096


def _quantize_rows(x, codes, scales, width, stride, top, smallest, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        broken = tl.maximum(broken, (values != values).to(tl.int32))
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), top), smallest)
    scale = tl.where(tl.max(broken, 0) > 0, float("nan"), scale)  # a maximum leaves NaN out; the reference does not
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        scaled = tl.div_rn(values, tl.zeros_like(values) + scale)
        tl.store(codes + row * width + columns, scaled.to(tl.float8e4nv), mask=columns < width)


_kernel: Any = None if triton is None else triton.jit(_quantize_rows)


def quantize_rows(x: Tensor, top: float, smallest: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, each with the scale that brings its largest magnitude to ``top``.

    Args:
        x: ``[rows, in_features]`` on a GPU; bfloat16, float16 or float32.
        top: the largest value of the number format.
        smallest: what a scale is at least.

    Raises:
        ImportError: there is no Triton.

    Returns:
        Codes float8 E4M3 ``[rows, in_features]`` (ties to even) and scales float32 ``[rows, 1]``, equal to those of
        `ptq.activation_formats.hardware.quantize_tokens_fp8`.
    """
    if triton is None:
        raise ImportError("Triton is not installed")
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        with torch.cuda.device(x.device):
            _kernel[(rows,)](x, codes, scales, width, x.stride(0), top, smallest, BLOCK=block, num_warps=8)
    return codes, scales

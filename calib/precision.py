"""Matrix products for statistics: float32 results, TF32 never, and half-precision inputs multiplied exactly.

A product of two bfloat16 numbers is exact in float32, so when both inputs are bfloat16 values the hardware's bfloat16
units with float32 accumulation give what a float32 product would, several times as fast. `product_t` takes that way
where the device has it and falls back to plain float32 products (the same numbers, slower) elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["has_fast_bfloat16", "product_t", "strict_float32"]


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Float32 products are float32 inside: no TF32 on a GPU, no bfloat16 on a CPU. Restores what was set before."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively (an older one emulates it, slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def product_t(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` in float32.

    Args:
        a: ``[t, n]``; b: ``[t, k]``, both of one dtype. bfloat16 inputs take the exact fast way, anything else is
            converted to float32 first.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or not has_fast_bfloat16(a.device):
        return a.float().T @ b.float()
    if a.device.type == "cuda":
        return torch.mm(a.T, b, out_dtype=torch.float32)
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"  # exact here: the inputs are bfloat16 values, accumulation is float32
        return a.float().T @ b.float()
    finally:
        backend.fp32_precision = before

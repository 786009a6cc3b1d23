"""Matrix products of statistics and solves: float32 results, TF32 never, and half-precision inputs multiplied exactly.

A product of two bfloat16 numbers is exact in float32, so when both inputs are bfloat16 values the hardware's bfloat16
units with float32 accumulation give what a float32 product would, several times as fast. `product_t` takes that way
where the device has it and falls back to plain float32 products (the same numbers, slower) elsewhere.

On x86 CPUs float32 products go to oneDNN: PyTorch's own choice there, MKL, uses half of the vector width on processors
that are not Intel's (108 against 240 GFLOP/s on one core of an AMD EPYC with AVX-512; equal on Intel's).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import platform
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

__all__ = ["Operand", "gram_bounds", "has_fast_bfloat16", "product", "product_t", "share_not_finite", "strict_float32"]

_GRAM_BLOCKS = 4  # of a symmetric product: 5/8 of the work; more blocks are narrower and no faster
_SMALL_BLOCK = 64  # columns below which a block is no longer worth its call


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


def share_not_finite(values: Tensor) -> float | None:
    """The share of NaN and Inf among ``values``; ``None`` if their sum is finite, which costs one pass over them."""
    if bool(torch.isfinite(values.sum(dtype=torch.float32))):
        return None
    return float((~torch.isfinite(values)).float().mean())


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32 with float32 accumulation (inside `strict_float32`), by the fastest library for it.

    Args:
        a: ``[m, k]``; b: ``[k, n]``, both float32 or both float64.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32 or not _has_onednn() or 0 in (*a.shape, *b.shape):
        return a @ b
    if not b.is_contiguous() and not b.T.is_contiguous():
        b = b.contiguous()  # anything else falls into a slow reference loop
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))


def _has_onednn() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return x86 and built_in and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclasses.dataclass(frozen=True)
class Operand:
    """A factor of several products, converted once.

    Args:
        values: ``[t, n]`` as the device wants them; bfloat16: they are bfloat16 numbers, to be multiplied as such.
    """

    values: Tensor
    bfloat16: bool

    @classmethod
    def of(cls, values: Tensor) -> Operand:
        """``values`` ``[t, n]``; float32 unless they are bfloat16 and the device multiplies those natively."""
        fast = values.dtype == torch.bfloat16 and has_fast_bfloat16(values.device)
        return cls(values if fast and values.device.type == "cuda" else values.float(), fast)

    def columns(self, start: int, stop: int) -> Operand:
        return Operand(self.values[:, start:stop], self.bfloat16)

    def transposed_by(self, other: Operand) -> Tensor:
        """``self^T other`` float32 ``[n, k]``."""
        if not (self.bfloat16 and other.bfloat16):
            return product(self.values.float().T, other.values.float())
        if self.values.device.type == "cuda":
            return torch.mm(self.values.T, other.values, out_dtype=torch.float32)
        with _bfloat16_units():
            return self.values.T @ other.values


@contextlib.contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Float32 products on a CPU take its bfloat16 units: exact for values that are bfloat16 numbers."""
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        yield
    finally:
        backend.fp32_precision = before


def product_t(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` in float32 for ``a`` ``[t, n]`` and ``b`` ``[t, k]``: exact and fast if both are bfloat16."""
    return Operand.of(a).transposed_by(Operand.of(b))


def gram_bounds(width: int) -> list[tuple[int, int]]:
    """Column blocks ``(start, stop)`` of a symmetric product of ``width`` columns."""
    count = max(1, min(_GRAM_BLOCKS, width // _SMALL_BLOCK))
    edges = [width * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))

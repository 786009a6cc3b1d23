"""Dynamic quantization of activations: every vector is rounded onto a grid of its own, and comes back as values.

One function serves linears' inputs, keys and values, at run time and while a method learns: what was learned runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["quantize_tokens", "quantized_channels"]


def quantize_tokens(x: Tensor, bits: int, symmetric: bool, share: float = 1.0) -> Tensor:
    """``x [..., n]`` with every vector of the last dimension rounded to ``2^bits`` levels (symmetric: one less).

    With ``lo = min(0, min x)`` and ``hi = max(0, max x)`` of a whole vector, which keeps zero on the grid:

        asymmetric   h = (hi - lo) / (2^bits - 1),  z = round(-lo / h),  levels  h * (-z .. 2^bits - 1 - z)
        symmetric    h = max(hi, -lo) / (2^(bits-1) - 1),                levels  h * -(2^(bits-1) - 1) .. 2^(bits-1) - 1

    Each channel takes the nearest level, at most ``h / 2`` away. Computed in float32 (float64 for float64 input); the
    result is then rounded to the dtype of ``x``. With gradients the function is straight-through: the gradient of the
    result is the gradient of ``x``, and nothing is kept for it.

    Args:
        x: activations; not changed.
        bits: 2 to 8.
        symmetric: as above.
        share: the first ``quantized_channels(n, share)`` channels are rounded, the others returned as they are; the
            range is that of the whole vector in any case.

    Returns:
        Values of the shape and dtype of ``x``. A vector of zeros stays one. Of a vector with NaN or infinity, every
        rounded channel becomes NaN: it is not hidden.

    Source: the per-token quantizer of OmniQuant (arXiv 2308.13137) and SliderQuant (arXiv 2603.25284, section B).
    """
    count = quantized_channels(x.shape[-1], share)
    if count == 0:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _StraightThrough.apply(x, bits, symmetric, count)  # type: ignore[no-untyped-call]
        return result
    return _rounded(x, bits, symmetric, count)


def quantized_channels(width: int, share: float) -> int:
    """``ceil(share * width)``, at most ``width``; what only floating point puts above a whole number does not count."""
    return min(width, math.ceil(share * width - 1e-6))


def _rounded(x: Tensor, bits: int, symmetric: bool, count: int) -> Tensor:
    width = x.shape[-1]
    step, low, high = _grid(x, bits, symmetric)
    part = x if count == width else x[..., :count]
    levels = torch.div(part, step).round_().clamp_(low, high).mul_(step)  # the one float32 temporary of the size of x
    rounded = levels.to(x.dtype)
    return rounded if count == width else torch.cat([rounded, x[..., count:]], dim=-1)


def _grid(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Any, Any]:
    """Step ``[..., 1]``, and the lowest and highest level in units of it (two numbers, or ``[..., 1]`` each)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    smallest = torch.finfo(wide).tiny  # the step of a vector of zeros: 0 / tiny is 0, where 0 / 0 is not
    lo, hi = (bound.to(wide) for bound in torch.aminmax(x, dim=-1, keepdim=True))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return torch.maximum(hi, -lo).div_(top).clamp_(min=smallest), -top, top
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    top = 2**bits - 1
    step = (hi / top - lo / top).clamp_(min=smallest)  # hi - lo could overflow
    low = torch.round(lo / step)
    return step, low, low + top


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool, count: int) -> Tensor:
        return _rounded(x, bits, symmetric, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None

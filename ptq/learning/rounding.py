"""Rounding of weights in groups with a gradient that goes through (spec of OmniQuant, SliderQuant, AutoRound, BRECQ).

A group ``z`` of a weight with range ``lo <= 0 <= hi`` is rounded to ``Q + 1`` levels, ``Q = 2^bits - 1``:

    q = clamp(r(z / h) + zero, 0, Q),    result = h (q - zero)

where ``r`` is nearest, nearest of ``z / h + offset`` (AutoRound), or ``floor(z / h) + soft`` (AdaRound).
With the error passed straight through ``r`` and ``inside`` the entries that the clamp leaves alone:

    d/dz = inside,   d/doffset = h inside,   d/dh = sum(q - zero - inside z / h),   d/dzero = -h sum(1 - inside)

Only ``z``, ``h`` and ``zero`` are kept for the backward pass; everything else is computed again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ptq.grids.scale_search import stored_scale
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["Kind", "Levels", "group_range", "levels_of", "round_groups", "stored"]

Kind = Literal["nearest", "offset", "soft"]


@dataclasses.dataclass(frozen=True)
class Levels:
    """The grid of every group: ``h [out, groups, 1]`` as stored (float32; negative mirrors it), ``zero`` likewise."""

    scale: Tensor
    zero: Tensor
    top: int


class _Round(torch.autograd.Function):
    """``z [out, groups, g]`` to the nearest levels; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, top: int, kind: Kind
    ) -> Tensor:
        ctx.save_for_backward(z, scale, zero, offset)
        ctx.top, ctx.kind = top, kind
        return _codes(z, scale, offset, kind)[0].add_(zero).clamp_(0, top).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        z, scale, zero, offset = ctx.saved_tensors
        shifted, exact = _codes(z, scale, offset, ctx.kind)
        shifted.add_(zero)
        inside = (shifted >= 0) & (shifted <= ctx.top)
        passed = torch.where(inside, gradient, 0.0)  # a product with truth values is many times slower on a CPU
        of_scale = of_zero = of_offset = None
        if ctx.needs_input_grad[1]:
            level = shifted.clamp_(0, ctx.top).sub_(zero)  # q - zero
            of_scale = torch.addcmul(level.mul_(gradient), passed, exact, value=-1).sum(-1, keepdim=True)
        if ctx.needs_input_grad[2]:
            of_zero = (passed - gradient).sum(-1, keepdim=True) * scale
        if ctx.needs_input_grad[3]:
            of_offset = passed * scale
        # Soft rounding moves the weight by whole levels only through its own variable.
        of_z = None if ctx.kind == "soft" else passed
        return of_z, of_scale, of_zero, of_offset, None, None


def _codes(z: Tensor, scale: Tensor, offset: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """``r(z / h)`` and ``z / h``."""
    exact = z / scale
    if kind == "soft":
        assert offset is not None
        return exact.floor().add_(offset), exact
    return (exact.round() if offset is None else (exact + offset).round_()), exact


class _Range(torch.autograd.Function):
    """Smallest and largest entry of every group, not beyond zero; the gradient goes to that entry."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        low, at_low = z.min(-1, keepdim=True)
        high, at_high = z.max(-1, keepdim=True)
        ctx.save_for_backward(at_low, at_high, low < 0, high > 0)
        ctx.shape = z.shape
        return low.clamp_(max=0.0), high.clamp_(min=0.0)

    @staticmethod
    def backward(ctx: Any, of_low: Tensor, of_high: Tensor) -> Tensor:
        at_low, at_high, is_low, is_high = ctx.saved_tensors
        gradient = torch.zeros(ctx.shape, dtype=of_low.dtype, device=of_low.device)
        gradient.scatter_add_(-1, at_low, of_low * is_low)
        return gradient.scatter_add_(-1, at_high, of_high * is_high)


class _Stored(torch.autograd.Function):
    """A scale as it will be stored; the gradient does not see the rounding."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(scale < 0, -1.0, 1.0) * stored_scale(scale.abs(), dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None


def group_range(z: Tensor) -> tuple[Tensor, Tensor]:
    """``(lo, hi)`` of groups ``[out, groups, g]``, each ``[out, groups, 1]``, ``lo <= 0 <= hi``."""
    low, high = _Range.apply(z)  # type: ignore[no-untyped-call]
    return low, high


def stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """``scale`` with the values that the scheme's ``scale_dtype`` has, float32, with the gradient of ``scale``."""
    result: Tensor = _Stored.apply(scale, SCALE_DTYPES[scheme.scale_dtype])  # type: ignore[no-untyped-call]
    return result


def levels_of(low: Tensor, high: Tensor, scheme: Scheme, *, zero_gradient: bool) -> Levels:
    """The grid of a range.

    Asymmetric: ``h = (hi - lo) / Q``, ``zero = round(-lo / h)``. Symmetric: the side that reaches further gets the one
    level that this side has more, ``|h| = max(-lo, hi) / 2^(bits-1)``, negative if that side is above zero.

    Args:
        low, high: ``[out, groups, 1]``, ``low <= 0 <= high``; scheme: bits and dtype of scales.
        zero_gradient: pass gradients through the rounding of the zero point (AutoRound does, OmniQuant does not).
    """
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        above = high > -low
        span = torch.where(above, -high, -low)
        span = torch.where(span == 0, torch.ones_like(span), span) / 2 ** (scheme.bits - 1)
        return Levels(stored(span, scheme), torch.full_like(low, 2.0 ** (scheme.bits - 1)).detach(), top)
    span = high - low
    exact = torch.where(span > 0, span, torch.ones_like(span)) / top
    zero = (-low / exact).clamp(0, top)
    rounded = zero.detach().round()
    return Levels(stored(exact, scheme), rounded + (zero - zero.detach()) if zero_gradient else rounded, top)


def round_groups(z: Tensor, levels: Levels, offset: Tensor | None, kind: Kind, share: float = 1.0) -> Tensor:
    """``z [out, groups, g]`` rounded, float32.

    Args:
        levels: of every group; offset: of the shape of ``z`` for the kinds that have one.
        share: only the first part of the input channels is rounded: ``ceil(share * groups)`` whole groups, or that part
            of the channels where there is one group. The rest is returned as it is.
    """
    if share >= 1:
        rounded: Tensor = _Round.apply(z, levels.scale, levels.zero, offset, levels.top, kind)  # type: ignore[no-untyped-call]
        return rounded
    dim = 2 if z.shape[1] == 1 else 1
    count = -int(-share * z.shape[dim] // 1)
    part = None if offset is None else offset.narrow(dim, 0, count)
    scale, zero = (t if dim == 2 else t.narrow(1, 0, count) for t in (levels.scale, levels.zero))
    head = _Round.apply(z.narrow(dim, 0, count), scale, zero, part, levels.top, kind)  # type: ignore[no-untyped-call]
    return torch.cat([head, z.narrow(dim, count, z.shape[dim] - count)], dim)

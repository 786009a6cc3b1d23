"""Scales and zero points of a weight's groups: min-max, or a search over shrunken ranges.

The search tries ranges ``ratio * (min, max)`` and keeps, per group, the one with the smallest error
``sum_j h_j |w_j - q_j|^p``: ``h = 1, p = 2.4`` for the p-norm (GPTQ's ``mse`` option), ``h = diag(H), p = 2`` for the
Hessian diagonal. A coarse sweep is followed by a refinement around its best ratio: 20 evaluations where a fine sweep
takes 80, and no worse in our measurements. Symmetric grids have one more level below zero than above; up to 4 bits
the search also tries mirrored (negative) scales, so that the extra level falls on the side that needs it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["SCALE_SEARCHES", "ScaleSearch", "fit_scales"]

ScaleSearch = Literal["minmax", "pnorm", "hessian"]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = ("minmax", "pnorm", "hessian")

_COARSE = torch.linspace(1.0, 0.3, 15).tolist()
_FINE = (-0.0375, -0.025, -0.0125, 0.0125, 0.025)
_PNORM = 2.4
_TINY = 1e-20
_MIRROR_BITS = 4  # above this a mirrored grid wins nothing that could be measured
_CHUNK = 1 << 19  # weights searched at once: 2 MiB, so that the temporaries stay in cache


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A slab of groups and what the search needs of it: ``weight`` [rows, groups, g], ``importance`` [groups, g]."""

    weight: Tensor
    importance: Tensor | None
    scheme: Scheme
    power: float

    def scale_zero(self, ratio: Tensor | float, sign: int) -> tuple[Tensor, Tensor]:
        """Stored scale (as float32) and zero ``[rows, groups]`` for the range shrunken by ``ratio``."""
        bits, dtype = self.scheme.bits, SCALE_DTYPES[self.scheme.scale_dtype]
        steps = 2**bits - 1
        low, high = self.weight.amin(-1).clamp(max=0.0), self.weight.amax(-1).clamp(min=0.0)
        if self.scheme.symmetric:
            span = 2 * torch.maximum(-low, high)
            zero = torch.full_like(span, 2 ** (bits - 1))
        else:
            span = high - low
            zero = (-low / span * steps).nan_to_num_(0.0).round_().clamp_(0, steps)
        scale = torch.where(span > 0, span, torch.ones_like(span)) / steps * ratio
        return stored_scale(scale, dtype) * sign, zero

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """``sum h |w - q|^p`` of every group, ``[rows, groups]``.

        Taken in units of the scale, and the power by way of logarithms of ``error^2 + tiny``: `pow` is some thirty
        times slower on the zeros and subnormals that weights which were on a grid before leave behind.
        """
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        exact = (self.weight / s).add_(z)
        error = exact.round().clamp_(0, 2**self.scheme.bits - 1).sub_(exact).square_()
        if self.power != 2:
            error = error.add_(_TINY).log_().mul_(self.power / 2).exp_()
        total = error.sum(-1) if self.importance is None else (error * self.importance).sum(-1)
        return total * scale.abs() ** self.power


def fit_scales(
    weight: Tensor, scheme: Scheme, search: ScaleSearch = "pnorm", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ``weight``.

    Args:
        weight: float32 ``[out, in]``.
        scheme: grid, groups and dtype of the scales.
        search: ``minmax``, ``pnorm`` or ``hessian``.
        importance: float32 ``[in]``, the diagonal of the Hessian; needed for ``hessian``.

    Returns:
        ``scale [out, groups]`` in the scheme's scale dtype and ``zero`` uint8 ``[out, groups]`` (``None`` if
        symmetric).

    Raises:
        NumericalError: a scale overflows its dtype.
        ValueError: ``hessian`` without an importance.
    """
    if search == "hessian" and importance is None:
        raise ValueError("scale search 'hessian' needs the diagonal of the Hessian")
    out, width = weight.shape
    groups, size = scheme.groups(width), scheme.group_size or width
    # Zero padding of a ragged last group is harmless: zero is always on the grid and inside every range.
    padded = torch.nn.functional.pad(weight, (0, groups * size - width)).view(out, groups, size)
    scale, zero = torch.empty(out, groups, device=weight.device), torch.empty(out, groups, device=weight.device)
    weights = None
    if search == "hessian" and importance is not None:
        weights = torch.nn.functional.pad(importance, (0, groups * size - width)).view(groups, size)
    rows = max(1, _CHUNK // (groups * size))
    for start in range(0, out, rows):
        slab = _Groups(padded[start : start + rows], weights, scheme, _PNORM if search == "pnorm" else 2)
        scale[start : start + rows], zero[start : start + rows] = _search(slab, search)
    if not bool(torch.isfinite(scale).all()):
        raise NumericalError(f"a scale overflows {scheme.scale_dtype}; use scale_dtype='bfloat16'.")
    return scale.to(SCALE_DTYPES[scheme.scale_dtype]), None if scheme.symmetric else zero.to(torch.uint8)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype`` and back to float32; never zero, so that dividing by it is safe."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    return scale.clamp(min=tiny).to(dtype).float().clamp_(min=tiny)


def _search(slab: _Groups, search: ScaleSearch) -> tuple[Tensor, Tensor]:
    if search == "minmax":
        return slab.scale_zero(1.0, 1)
    mirrored = slab.scheme.symmetric and slab.scheme.bits <= _MIRROR_BITS
    error, scale, zero = _search_ratio(slab, 1)
    if mirrored:
        other_error, other_scale, other_zero = _search_ratio(slab, -1)
        better = other_error < error
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
    return scale, zero


def _search_ratio(slab: _Groups, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best (error, scale, zero) over the coarse ratios, then over small steps around each group's best."""
    scale, zero = slab.scale_zero(1.0, sign)
    error, ratio = slab.error(scale, zero), torch.ones_like(scale)
    centre = ratio
    for number, step in enumerate((*_COARSE[1:], *_FINE)):
        coarse = number < len(_COARSE) - 1
        trial = torch.full_like(scale, step) if coarse else (centre + step).clamp_(max=1.0)
        trial_scale, trial_zero = slab.scale_zero(trial, sign)
        trial_error = slab.error(trial_scale, trial_zero)
        better = trial_error < error
        error = torch.where(better, trial_error, error)
        scale, zero = torch.where(better, trial_scale, scale), torch.where(better, trial_zero, zero)
        ratio = torch.where(better, trial, ratio)
        if coarse:
            centre = ratio  # fine steps go around the best coarse ratio, not around each other
    return error, scale, zero

"""Scales and zero points of a weight's groups: min-max, or a search over shrunken ranges.

The search tries ranges ``ratio * (min, max)`` and keeps, per group, the one with the smallest error
``sum_j h_j |w_j - q_j|^p``: ``h = 1, p = 2.4`` for the p-norm (GPTQ's ``mse`` option), ``h = diag(H), p = 2`` for the
Hessian diagonal. Symmetric grids have one more level below zero than above; up to 4 bits the search also tries
mirrored (negative) scales, so that the extra level falls on the side that needs it.

It goes in two steps. First every ratio is scored from a table: the error of a weight depends only on where it lies in
its group's range, so a row of the table holds, for one of 128 positions a level, the errors at all ratios, and a
group's scores are the sum of its weights' rows (`torch.nn.functional.embedding_bag`). Then the best ratio, its two
neighbours half a step away and min-max are measured exactly, with the scale rounded as it will be stored. Asymmetric
grids of more than 4 bits would need too large a table (one for every zero point): they go through a coarse and a
fine sweep of exact measurements.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.grids.grid import check_finite
from ptq.grids.storage import SCALE_DTYPES, Storage

__all__ = ["PNORM", "SCALE_SEARCHES", "ScaleSearch", "fit_scales", "stored_scale"]

ScaleSearch = Literal["minmax", "pnorm", "hessian", "mse", "four_over_six", "floor", "even", "rceil"]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = (
    *("minmax", "pnorm", "hessian"),  # of every number format
    *("mse", "four_over_six", "floor", "even", "rceil"),  # of block formats, see `ptq.grids.block_scales`
)

_RATIOS = tuple(torch.linspace(1.0, 0.3, 57).tolist())  # steps of 0.0125
_NEAR = (0.0, -0.00625, 0.00625)  # measured exactly around the table's best
_COARSE, _FINE = _RATIOS[::4], (-0.0375, -0.025, -0.0125, 0.0125, 0.025)  # without a table
_POSITIONS = 128  # rows of the table a level
_TABLE_BITS = 4  # asymmetric grids above this have no table
PNORM = 2.4
_TINY = 1e-20
_MIRROR_BITS = 4  # above this a mirrored grid wins nothing that could be measured
_CHUNK = 1 << 19  # weights searched at once: 2 MiB, so that the temporaries stay in cache
_DEVICE_CHUNK = 1 << 24  # the same on a GPU, where launches cost more than memory


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A slab of groups and what the search needs of it.

    Args:
        weight: ``[rows, groups, g]``; importance: ``[rows, groups, g]`` or ``None``.
        unit: scale at ratio 1, before it is rounded; zero: zero points, both ``[rows, groups]``.
    """

    weight: Tensor
    importance: Tensor | None
    scheme: Storage
    power: float
    unit: Tensor
    zero: Tensor

    def scale(self, ratio: Tensor | float, sign: Tensor | float) -> Tensor:
        """Stored scale (as float32) ``[rows, groups]`` of the range shrunken by ``ratio``."""
        return stored_scale(self.unit * ratio, SCALE_DTYPES[self.scheme.scale_dtype]) * sign

    def error(self, scale: Tensor) -> Tensor:
        """``sum h |w - q|^p`` of every group, ``[rows, groups]``.

        Taken in units of the scale, and the power by way of logarithms of ``error^2 + tiny``: `pow` is some thirty
        times slower on the zeros and subnormals that weights which were on a grid before leave behind.
        """
        exact = torch.addcdiv(self.zero.unsqueeze(-1), self.weight, scale.unsqueeze(-1))
        error = exact.round().clamp_(0, 2**self.scheme.bits - 1).sub_(exact).square_()
        if self.power != 2:
            error = error.add_(_TINY).log_().mul_(self.power / 2).exp_()
        total = error.sum(-1) if self.importance is None else error.mul_(self.importance).sum(-1)
        return total * scale.abs() ** self.power


def fit_scales(
    weight: Tensor, scheme: Storage, search: ScaleSearch = "pnorm", importance: Tensor | None = None
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
        NumericalError: a weight is not finite, or a scale overflows its dtype.
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
        weights = torch.nn.functional.pad(importance, (0, groups * size - width)).view(1, groups, size)
    rows = max(1, (_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // (groups * size))
    for start in range(0, out, rows):
        slab = _slab(padded[start : start + rows], weights, scheme, PNORM if search == "pnorm" else 2)
        scale[start : start + rows] = slab.scale(1.0, 1.0) if search == "minmax" else _search(slab)
        zero[start : start + rows] = slab.zero
    if not bool(torch.isfinite(scale).all()):
        hint = "Use scale_dtype='bfloat16'." if scheme.scale_dtype == "float16" else "The checkpoint may be damaged."
        raise NumericalError(f"a scale overflows {scheme.scale_dtype}: the weights are too large. {hint}")
    return scale.to(SCALE_DTYPES[scheme.scale_dtype]), None if scheme.symmetric else zero.to(torch.uint8)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype`` and back to float32; never zero, so that dividing by it is safe."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    return scale.clamp(min=tiny).to(dtype).float().clamp_(min=tiny)


def _slab(weight: Tensor, importance: Tensor | None, scheme: Storage, power: float) -> _Groups:
    steps = 2**scheme.bits - 1
    low, high = weight.amin(-1).clamp_(max=0.0), weight.amax(-1).clamp_(min=0.0)
    if scheme.symmetric:
        span = 2 * torch.maximum(-low, high)
        zero = torch.full_like(span, 2 ** (scheme.bits - 1))
    else:
        span = high - low
        zero = (-low / span * steps).nan_to_num_(0.0).round_().clamp_(0, steps)
    check_finite(span)
    unit = torch.where(span > 0, span, torch.ones_like(span)) / steps
    return _Groups(weight, importance, scheme, power, unit, zero)


def _search(slab: _Groups) -> Tensor:
    """The best scales found, ``[rows, groups]``."""
    plus = torch.ones_like(slab.unit)
    best = _Best(slab, plus)
    if not slab.scheme.symmetric and slab.scheme.bits > _TABLE_BITS:
        for ratio in _COARSE[1:]:
            best.offer(plus * ratio, plus)
        centre = best.ratio  # fine steps go around the best coarse ratio, not around each other
        for step in _FINE:
            best.offer((centre + step).clamp_(max=1.0), plus)
        return best.scale
    ratio, sign = _guess(slab)
    for step in _NEAR:
        best.offer((ratio + step).clamp_(max=1.0), sign)
    return best.scale


class _Best:
    """The best exactly measured scales so far, from min-max on."""

    def __init__(self, slab: _Groups, ratio: Tensor) -> None:
        self._slab, self.ratio = slab, ratio
        self.scale = slab.scale(ratio, 1.0)
        self._error = slab.error(self.scale)

    def offer(self, ratio: Tensor, sign: Tensor) -> None:
        """Take ``ratio`` and ``sign`` ``[rows, groups]`` for the groups where they are better."""
        scale = self._slab.scale(ratio, sign)
        error = self._slab.error(scale)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale, self.ratio = torch.where(better, scale, self.scale), torch.where(better, ratio, self.ratio)


def _guess(slab: _Groups) -> tuple[Tensor, Tensor]:
    """Ratio and sign with the smallest error by the table, each ``[rows, groups]``."""
    scheme, device = slab.scheme, slab.weight.device
    table = _table(scheme.bits, scheme.symmetric, slab.power, device)
    zero = slab.zero.unsqueeze(-1)
    # In levels at ratio 1 a weight lies between -1/2 and 2^bits - 1/2: half a level is what rounding zero can shift.
    position = torch.addcdiv(zero + 0.5, slab.weight, slab.unit.unsqueeze(-1)).mul_(_POSITIONS).round_()
    position.clamp_(0, _rows_of_zero(scheme.bits) - 1)  # subnormal weights divide to anything
    if not scheme.symmetric:
        position.add_(zero, alpha=_rows_of_zero(scheme.bits))
    index = position.to(torch.int32).flatten(0, 1)
    importance = None if slab.importance is None else slab.importance.expand_as(slab.weight).reshape(index.shape)
    score = torch.nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=importance)
    best = score.argmin(1).view(slab.unit.shape)
    ratios = torch.tensor(_RATIOS, device=device)
    sign = torch.where(best < len(_RATIOS), 1.0, -1.0)
    return ratios[best % len(_RATIOS)], sign


def _rows_of_zero(bits: int) -> int:
    return (_POSITIONS << bits) + 1


@functools.lru_cache(maxsize=16)
def _table(bits: int, symmetric: bool, power: float, device: torch.device) -> Tensor:
    """``|error|^power`` in units of the scale at ratio 1, float32 ``[positions, ratios]``.

    Positions run from half a level below code 0 to half a level above the last; for asymmetric grids there is one such
    run for every zero point. Symmetric grids with few levels have the mirrored ratios in a second run of columns.
    """
    steps, ratios = 2**bits - 1, torch.tensor(_RATIOS)
    zeros = torch.tensor([2 ** (bits - 1)]) if symmetric else torch.arange(2**bits)
    position = torch.arange(_rows_of_zero(bits)) / _POSITIONS - 0.5
    offset = (position - zeros[:, None]).flatten()[:, None]  # w / scale at ratio 1
    zero = zeros.repeat_interleave(len(position))[:, None]
    columns = []
    for sign in (1, -1) if symmetric and bits <= _MIRROR_BITS else (1,):
        exact = sign * offset / ratios + zero
        error = exact.round().clamp_(0, steps).sub_(exact).abs_().mul_(ratios)
        columns.append(error.pow_(power))
    return torch.cat(columns, 1).to(device)

"""Scales of a grid given by a table of levels, symmetric around zero: floating-point numbers, codebooks.

Ranges ``ratio * max|w|`` are tried in a coarse and a fine sweep and measured exactly, with every scale rounded as it
will be stored; the error is that of `ptq.grids.scale_search`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.grids.grid import Grid, check_finite
from ptq.grids.scale_search import PNORM, ScaleSearch, stored_scale

__all__ = ["fit_table_scales", "grouped"]

_COARSE = tuple(1.0 - 0.05 * step for step in range(13))  # down to 0.4 of the largest weight
_FINE = (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375)
_CHUNK = 1 << 19  # weights searched at once on a CPU: the temporaries stay in cache
_DEVICE_CHUNK = 1 << 24


def grouped(values: Tensor, size: int) -> Tensor:
    """``[rows, width]`` as ``[rows, groups, size]``; a last group that is shorter is filled up with zeros."""
    rows, width = values.shape
    groups = -(-width // size)
    return torch.nn.functional.pad(values, (0, groups * size - width)).view(rows, groups, size)


def fit_table_scales(
    weight: Tensor,
    grid: Grid,
    group_size: int | None,
    dtype: torch.dtype,
    search: ScaleSearch = "pnorm",
    importance: Tensor | None = None,
) -> Tensor:
    """Scales ``[out, groups]`` in ``dtype`` that bring the levels of ``grid`` nearest to the weight's groups.

    Args:
        weight: float32 ``[out, in]``.
        grid: levels around zero, on the device of ``weight``.
        group_size: input channels per scale; ``None`` is one scale per row.
        dtype: in which scales are stored.
        search: ``minmax`` (the largest level at the largest weight), ``pnorm`` or ``hessian``.
        importance: float32 ``[in]``, the Hessian's diagonal, for ``hessian``.

    Raises:
        NumericalError: a weight is not finite, or a scale overflows ``dtype``.
        ValueError: ``hessian`` without an importance.
    """
    if search == "hessian" and importance is None:
        raise ValueError("scale search 'hessian' needs the diagonal of the Hessian")
    size = group_size or weight.shape[1]
    weighted = None if search != "hessian" or importance is None else grouped(importance[None], size)
    power = PNORM if search == "pnorm" else 2.0
    step = max(1, (_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // weight.shape[1])
    parts = []
    for start in range(0, len(weight), step):
        groups = grouped(weight[start : start + step], size)
        unit = groups.abs().amax(-1) / float(grid.levels.abs().max())
        check_finite(unit)
        if search == "minmax":
            parts.append(stored_scale(unit, dtype))
        else:
            parts.append(_best(groups, weighted, grid, unit, dtype, power))
    scale = torch.cat(parts)
    if not bool(torch.isfinite(scale).all()):
        raise NumericalError(f"a scale overflows {dtype}: the weights are too large. Use scale_dtype='bfloat16'.")
    return scale.to(dtype)


def _best(
    groups: Tensor, importance: Tensor | None, grid: Grid, unit: Tensor, dtype: torch.dtype, power: float
) -> Tensor:
    """The scale with the smallest error of every group, float32 ``[rows, groups]``."""
    best_ratio = torch.ones_like(unit)
    best = stored_scale(unit, dtype)
    error = _error(groups, importance, grid, best, power)
    for offsets in (_COARSE[1:], _FINE):
        centre = best_ratio if offsets is _FINE else torch.zeros_like(unit)
        for offset in offsets:
            ratio = centre + offset
            scale = stored_scale(unit * ratio, dtype)
            found = _error(groups, importance, grid, scale, power)
            better = found < error
            error = torch.where(better, found, error)
            best, best_ratio = torch.where(better, scale, best), torch.where(better, ratio, best_ratio)
    return best


def _error(groups: Tensor, importance: Tensor | None, grid: Grid, scale: Tensor, power: float) -> Tensor:
    """``sum h |w - q|^p`` of every group, ``[rows, groups]``."""
    exact = groups / scale.unsqueeze(-1)
    error = grid.snap(exact).sub_(exact).abs_()
    error = error.square_() if power == 2 else error.square_().add_(1e-20).log_().mul_(power / 2).exp_()
    total = error.sum(-1) if importance is None else error.mul_(importance).sum(-1)
    return total * scale**power

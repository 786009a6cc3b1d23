"""What solvers of layer-wise methods do after rounding: codes and scales improved in turn on the same quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.grids import ScaledGrid
from ptq.scheme import Scheme
from ptq.solvers import Factor, coordinate_descent, quadratic, refit_flops, refit_scales

__all__ = ["check_passes", "refine", "refine_flops"]


def check_passes(method: str, **passes: int) -> None:
    """Check numbers of passes by the names of their options."""
    for name, value in passes.items():
        if value < 0:
            raise UsageError(f"{method}: {name} is 0 or more, got {value!r}.")


def refine(
    target: Tensor,
    codes: Tensor,
    grid: ScaledGrid,
    factor: Factor,
    scheme: Scheme,
    *,
    cd_passes: int = 0,
    refit_passes: int = 0,
) -> tuple[Tensor, ScaledGrid, tuple[str, ...]]:
    """Improve the codes ``[m, n]`` by coordinate descent, and then the scales with the codes held.

    Args:
        target: float32 ``[m, n]``; codes, grid: what it was rounded to.
        factor: order and damped Hessian.
        scheme: of the weight.
        cd_passes: sweeps over the columns.
        refit_passes: how often scales are refitted; each time ``cd_passes`` sweeps over the columns go before.

    Returns:
        Codes and grid whose loss is not higher in any row, and a note where scales could not be refitted.
    """
    notes: tuple[str, ...] = ()
    if refit_passes and scheme.number_format.scale_groups(scheme, target.shape[1]) is None:
        notes = (f"the scales of {scheme.number_format.name} were not refitted: they are no free numbers per row",)
        refit_passes, cd_passes = 0, cd_passes * refit_passes
    for _ in range(max(1, refit_passes)):
        if cd_passes:
            codes = _descend(target, codes, grid, factor, cd_passes)
        if refit_passes:
            grid = _refit(target, codes, grid, factor, scheme)
    return codes, grid, notes


def refine_flops(shape: torch.Size, cd_passes: int, refit_passes: int) -> int:
    """Floating-point operations of `refine`."""
    rows, width = shape
    square = rows * width * width
    descent = 2 * width**3 + (2 * cd_passes + 4) * square if cd_passes else 0
    refit = refit_flops(rows, width) + 4 * square
    return max(1, refit_passes) * descent + refit_passes * refit


def _descend(target: Tensor, codes: Tensor, grid: ScaledGrid, factor: Factor, passes: int) -> Tensor:
    """Coordinate descent, kept only where it lowered a row's loss (rounding of sums could raise it by an ulp)."""
    found = coordinate_descent(target, codes, grid, factor, passes=passes)
    better = _better(target, grid.dequantize(found), grid.dequantize(codes), factor)
    return found.where(better, codes)


def _refit(target: Tensor, codes: Tensor, grid: ScaledGrid, factor: Factor, scheme: Scheme) -> ScaledGrid:
    """The grid with scales refitted to the codes, in the rows where that lowered the loss."""
    record, width = scheme.number_format, target.shape[1]
    group = record.scale_groups(scheme, width)
    assert group is not None
    before, old = grid.dequantize(codes), grid.params["scale"]
    scale = refit_scales(target, before, factor, old, group.to(old.device))
    found = record.grid({**grid.params, "scale": scale}, scheme, width)
    better = _better(target, found.dequantize(codes), before, factor)
    # Through float32: not every dtype of scales can be chosen from.
    kept = scale.float().where(better, old.float()).to(old.dtype)
    return record.grid({**grid.params, "scale": kept}, scheme, width)


def _better(target: Tensor, new: Tensor, old: Tensor, factor: Factor) -> Tensor:
    """The rows ``[m, 1]`` where new values have a lower loss."""
    return (quadratic(target - new, factor) < quadratic(target - old, factor))[:, None]

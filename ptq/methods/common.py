"""Parts that several methods share: fitting a grid, factorizing a group's Hessian once."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.stats import LinearStatistics
from ptq.errors import NumericalError, UsageError, unknown_name
from ptq.grids import SCALE_SEARCHES, BoundGrid, ScaleSearch, fit_scales, uniform_grid
from ptq.scheme import Scheme
from ptq.solvers import ORDERS, Factor, Order, factorize, factorize_flops

__all__ = ["check_damping", "check_order", "check_scales", "fit_grid", "group_factor", "require"]


def require(stats: LinearStatistics | None) -> LinearStatistics:
    """The statistics of a method that cannot work without."""
    if stats is None:
        raise UsageError("this method needs calibration data; give --calib.")
    return stats


def check_scales(name: str) -> None:
    if name not in SCALE_SEARCHES:
        raise unknown_name("scale search", name, SCALE_SEARCHES)


def check_order(name: str) -> None:
    if name not in ORDERS:
        raise unknown_name("column order", name, ORDERS)


def check_damping(value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"damping is a fraction of the mean diagonal, 0 to 1; got {value!r}.")


def fit_grid(target: Tensor, scheme: Scheme, search: ScaleSearch, stats: LinearStatistics | None) -> BoundGrid:
    """The scheme's grid with scales fitted to ``target`` ``[out, in]``, static, in the original column order."""
    importance = require(stats).hessian.diagonal() if search == "hessian" else None
    scale, zero = fit_scales(target, scheme, search, importance)
    centre = torch.full(scale.shape, 2.0 ** (scheme.bits - 1), device=target.device)
    index = scheme.group_index(target.shape[1], target.device)
    return BoundGrid(
        uniform_grid(scheme.bits, target.device), scale.float(), centre if zero is None else zero.float(), index
    )


def group_factor(stats: LinearStatistics, damping: float, order: Order) -> tuple[Factor, int]:
    """The factor of the group's damped Hessian, made once for all linears of the group, and the floating-point
    operations that took (0 if it was there).

    The Hessian is not changed, so damping does not add up over the linears that share it.

    Raises:
        NumericalError: names the linear.
    """
    flops = 0

    def make() -> Factor:
        nonlocal flops
        flops = factorize_flops(len(stats.hessian))
        return factorize(stats.hessian, damping, order)

    try:
        return stats.group.memo(("factor", damping, order), make), flops
    except NumericalError as error:
        raise NumericalError(f"{error}. More or other calibration text may help.") from error

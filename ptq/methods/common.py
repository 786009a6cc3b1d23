"""Parts that several methods share: fitting a grid, factorizing a group's Hessian once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from calib.stats import LinearStatistics
from ptq.errors import NumericalError, UsageError, unknown_name
from ptq.grids import SCALE_SEARCHES, ScaledGrid, ScaleSearch
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


def fit_grid(
    target: Tensor,
    scheme: Scheme,
    search: ScaleSearch,
    stats: LinearStatistics | None,
    shared: Mapping[str, Tensor] | None = None,
) -> ScaledGrid:
    """The scheme's grid with parameters fitted to ``target`` ``[out, in]``, static, in the original column order."""
    importance = require(stats).hessian.diagonal() if search == "hessian" else None
    params = scheme.number_format.fit(target, scheme, search, importance, shared)
    return scheme.number_format.grid(params, scheme, target.shape[1])


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

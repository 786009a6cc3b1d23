"""Solvers: they see a target, a grid, a factor of the Hessian, and know no method, format or model."""

from ptq.solvers.beam import beam_flops, beam_search
from ptq.solvers.cholesky import ORDERS, Factor, Order, column_order, factorize, factorize_flops, solve_flops
from ptq.solvers.scale_refit import refit_flops, refit_scales
from ptq.solvers.successive import coordinate_descent, quadratic, successive_rounding, sweep_flops

__all__ = [
    "ORDERS",
    "Factor",
    "Order",
    "beam_flops",
    "beam_search",
    "column_order",
    "coordinate_descent",
    "factorize",
    "factorize_flops",
    "quadratic",
    "refit_flops",
    "refit_scales",
    "solve_flops",
    "successive_rounding",
    "sweep_flops",
]

"""Solvers: they see a target, a grid, a factor of the Hessian, and know no method, format or model."""

from ptq.solvers.beam import beam_search
from ptq.solvers.cholesky import ORDERS, Factor, Order, column_order, factorize
from ptq.solvers.successive import coordinate_descent, quadratic, successive_rounding

__all__ = [
    "ORDERS",
    "Factor",
    "Order",
    "beam_search",
    "column_order",
    "coordinate_descent",
    "factorize",
    "quadratic",
    "successive_rounding",
]

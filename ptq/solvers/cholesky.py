"""Column orders and the triangular factor of a damped Hessian, shared by every solver.

Columns are processed in an order ``p``; the Hessian in that order is written ``H_p = U U^T`` with ``U`` upper
triangular, so that ``||E X~||^2 = ||E U||^2`` and the error of column j depends only on columns processed before it.
(In the literature's picture this is the Cholesky factor of the reversed matrix, swept from the last column to the
first.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from calib.precision import product
from ptq.errors import NumericalError

__all__ = ["ORDERS", "Factor", "Order", "column_order", "factorize", "factorize_flops", "solve_flops"]

Order = Literal["descending", "natural", "min_pivot"]
ORDERS: tuple[Order, ...] = ("descending", "natural", "min_pivot")
_MAX_DAMPING = 1.0
_BLOCK = 128  # columns of a block of a triangular solve


@dataclasses.dataclass(frozen=True)
class Factor:
    """``H_p = U U^T`` of the damped Hessian with columns in processing order.

    Args:
        order: int64 ``[n]``; ``order[0]`` is the column processed first.
        upper: float32 ``[n, n]`` ``U``, upper triangular (stored by columns: a column's rows are neighbours).
        damping: the fraction of the mean diagonal that was added.
        notes: fallbacks taken, in words.
    """

    order: Tensor
    upper: Tensor
    damping: float
    notes: tuple[str, ...] = ()

    @property
    def hessian(self) -> Tensor:
        """The damped Hessian in processing order, float32 ``[n, n]``, multiplied out again."""
        return product(self.upper, self.upper.T)

    @property
    def pivots(self) -> Tensor:
        """``diag(U)`` ``[n]``: the weight of each column's rounding error."""
        return self.upper.diagonal()

    def unit_upper(self) -> Tensor:
        """``U diag(U)^-1`` ``[n, n]``: how much of an earlier column's error each later column takes over."""
        return self.upper / self.pivots

    def solve(self, rhs: Tensor) -> Tensor:
        """``rhs H^-1`` for ``rhs`` ``[m, n]`` in the original column order.

        Two triangular solves by blocks of columns, whose diagonal blocks are inverted: then nearly all of the work is
        matrix products, which are several times as fast as a triangular solve.
        """
        upper, solved = self.upper, rhs.index_select(1, self.order).T.contiguous()  # [n, m]
        width = len(upper)
        edges = [(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]
        inverses = [_inverse(upper[start:stop, start:stop]) for start, stop in edges]
        for (start, stop), inverse in zip(reversed(edges), reversed(inverses), strict=True):  # U Y = rhs
            part = solved[start:stop]
            if stop < width:
                part = part - product(upper[start:stop, stop:], solved[stop:])
            solved[start:stop] = product(inverse, part)
        for (start, stop), inverse in zip(edges, inverses, strict=True):  # U^T X = Y
            part = solved[start:stop]
            if start:
                part = part - product(upper[:start, start:stop].T, solved[:start])
            solved[start:stop] = product(inverse.T, part)
        return self.restore(solved.T)

    def restore(self, columns: Tensor) -> Tensor:
        """Columns in processing order ``[m, n]`` put back in the original order."""
        result = torch.empty(columns.shape, dtype=columns.dtype, device=columns.device)
        result[:, self.order] = columns
        return result


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of a small upper triangular block."""
    identity = torch.eye(len(upper), device=upper.device, dtype=upper.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.contiguous()


def factorize_flops(width: int) -> int:
    """Floating-point operations of `factorize`."""
    return width**3 // 3


def solve_flops(rows: int, width: int) -> int:
    """Floating-point operations of `Factor.solve` for ``rows`` right-hand sides."""
    return 2 * rows * width * width


def column_order(hessian: Tensor, order: Order) -> Tensor:
    """The processing order of columns, int64 ``[n]``.

    ``descending`` takes the largest diagonal first (act-order), ``natural`` goes from left to right, ``min_pivot``
    takes last the column with the smallest remaining pivot of the LDL decomposition (greedy on the trace of D).
    """
    if order == "natural":
        return torch.arange(len(hessian), device=hessian.device)
    if order == "descending":
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return _min_pivot(hessian)


def _min_pivot(hessian: Tensor) -> Tensor:
    """Pivoted LDL, smallest pivot first; what is eliminated first is rounded last. O(n^3) in n steps."""
    schur = hessian.double().clone()
    width = len(schur)
    left = torch.ones(width, dtype=torch.bool, device=schur.device)
    picked = torch.empty(width, dtype=torch.int64, device=schur.device)
    for step in range(width):
        pivot = torch.where(left, schur.diagonal(), torch.inf).argmin()
        picked[step] = pivot
        left[pivot] = False
        column = torch.where(left, schur[:, pivot], 0.0)
        schur.addr_(column, column / schur[pivot, pivot].clamp(min=1e-30), alpha=-1.0)
    return picked.flip(0)


def factorize(hessian: Tensor, damping: float = 0.01, order: Order = "descending") -> Factor:
    """Damp, order and factorize a Hessian.

    ``damping`` times the mean of the (live) diagonal is added. Columns that no input ever touched (zero diagonal) get
    the mean as their diagonal, which makes them independent of all others: they are rounded to nearest. If the
    float32 factorization fails, float64 is tried, then ten times the damping, up to 1; each is noted.

    Args:
        hessian: float32 ``[n, n]``, symmetric, not changed.
        damping: fraction of the mean diagonal, at least 0.
        order: the processing order.

    Raises:
        NumericalError: the Hessian is not finite, or no fallback could factor it.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian.sum())):
        raise NumericalError("the Hessian holds NaN or Inf")
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else torch.ones_like(diagonal[0])
    dead = int((~live).sum())
    if dead:
        hessian = hessian.clone()
        hessian[~live, :] = 0.0
        hessian[:, ~live] = 0.0
        hessian.diagonal()[~live] = mean
    notes = (f"{dead} input channels were never active: rounded to nearest",) if dead else ()
    permutation = column_order(hessian, order)
    # Reversed, so that LAPACK's lower factor is U back to front.
    damped = hessian.index_select(0, permutation.flip(0)).index_select(1, permutation.flip(0))
    diagonal = damped.diagonal().clone()
    while True:
        damped.diagonal().copy_(diagonal + damping * mean)
        for dtype in (torch.float32, torch.float64):
            lower, info = torch.linalg.cholesky_ex(damped.to(dtype))
            if int(info) == 0 and bool(torch.isfinite(lower.sum())):
                if dtype == torch.float64:
                    notes = (*notes, "the factorization needed float64")
                upper = lower.to(torch.float32).T.flip(0, 1).contiguous().T
                return Factor(permutation, upper, damping, notes)
        if damping >= _MAX_DAMPING:
            raise NumericalError(f"the Hessian could not be factorized, even with damping {damping:g}")
        damping = min(_MAX_DAMPING, 10 * max(damping, 1e-3))
        notes = (*notes, f"damping was raised to {damping:g}")

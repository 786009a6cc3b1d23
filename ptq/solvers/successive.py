"""Successive rounding: one sweep over the columns in which each takes over the errors of those before it.

Minimises ``||(T - Q) X~||^2 = ||E U||_F^2 = sum_j U_jj^2 (w_j - q_j)^2`` greedily (E = T - Q, U from `Factor`), with

    w_j = T_j + sum_{k before j} (T_k - Q_k) U_kj / U_jj ,        q_j = the grid's value nearest to w_j.

With T = W this is GPTQ (LDLQ; Babai's nearest plane), with T = the mismatch-corrected target it is CoreQ. GPTAQ is the
same sweep with a target that drifts: ``T_j`` is replaced by ``T_j + sum_{k before j} w_k P_kj``.

Work: one product of m n^2 fused multiply-adds in blocks, plus a few vector operations a column inside a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq.grids import BoundGrid
from ptq.solvers.cholesky import Factor
from ptq.solvers.threads import one_thread

__all__ = ["GridFitter", "coordinate_descent", "quadratic", "successive_rounding"]

_BLOCK = 128  # columns a product is delayed for; a multiple of common group sizes
GridFitter = Callable[[int, int, Tensor], BoundGrid]
"""``(start, stop, columns)`` -> the grid to use from ``start`` on; ``columns`` are those, errors added."""


def successive_rounding(
    target: Tensor,
    grid: BoundGrid,
    factor: Factor,
    *,
    drift: Tensor | None = None,
    refit: GridFitter | None = None,
    block: int = _BLOCK,
) -> tuple[Tensor, BoundGrid]:
    """Round ``target`` onto ``grid``, column after column.

    Args:
        target: float32 ``[m, n]`` in the original column order.
        grid: the grid with static scales, in the original column order.
        factor: order and triangular factor.
        drift: float32 ``[n, n]`` strictly upper triangular ``P`` in processing order (GPTAQ).
        refit: called at every block of columns (in processing order) for scales fitted to error-compensated
            columns; ``block`` should then be the group size.
        block: columns in a block.

    Returns:
        Codes uint8 ``[m, n]`` in the original column order, and the grid they belong to.
    """
    order, feed = factor.order, factor.unit_upper()
    wanted = target[:, order].T.contiguous()  # [n, m]: a column of the weight is a contiguous row here
    grid = grid.permuted(order)
    errors = torch.zeros_like(wanted)  # T - Q of the columns done so far
    seen = torch.zeros_like(wanted) if drift is not None else None  # w, before rounding
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)
    for start in range(0, len(wanted), block):
        stop = min(start + block, len(wanted))
        if drift is not None and seen is not None:
            wanted[start:stop].addmm_(drift[:start, start:stop].T, seen[:start])
        compensated = torch.addmm(wanted[start:stop], feed[:start, start:stop].T, errors[:start])
        if refit is not None:
            grid = refit(start, stop, compensated.T)
        local = None if drift is None else drift[start:stop, start:stop]
        with one_thread(compensated):
            _round_block(
                wanted[start:stop],
                compensated,
                grid,
                start,
                feed[start:stop, start:stop],
                local,
                codes[start:stop],
                errors[start:stop],
            )
        if seen is not None:
            seen[start:stop] = compensated
    return _restore(codes, order), grid


def _round_block(
    wanted: Tensor,
    columns: Tensor,
    grid: BoundGrid,
    start: int,
    feed: Tensor,
    drift: Tensor | None,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """The columns of one block, in place: ``codes`` and ``errors`` are filled, ``columns`` ends as w unrounded."""
    scale, zero = (part.T.contiguous() for part in grid.columns(start, start + len(columns)))
    levels, offset = torch.empty_like(columns), zero * scale
    for j in range(len(columns)):  # five operations a column: on a GPU their launches are what this loop costs
        levels[j] = level = grid.grid.snap(torch.addcdiv(zero[j], columns[j], scale[j]))
        torch.addcmul(wanted[j] + offset[j], level, scale[j], value=-1.0, out=errors[j])
        if drift is not None:
            wanted[j + 1 :].addr_(drift[j, j + 1 :], columns[j])
            columns[j + 1 :].addr_(drift[j, j + 1 :], columns[j])
        columns[j + 1 :].addr_(feed[j, j + 1 :], errors[j])
    codes.copy_(grid.grid.codes_of(levels))


def _restore(codes: Tensor, order: Tensor) -> Tensor:
    """``[n, m]`` in processing order to ``[m, n]`` in the original order."""
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def quadratic(difference: Tensor, factor: Factor) -> Tensor:
    """``||(T - Q) U||^2`` of every row, float32 ``[m]``, for ``difference`` T - Q ``[m, n]`` in the original order."""
    return (difference[:, factor.order] @ factor.upper).square_().sum(1)


def coordinate_descent(
    target: Tensor, codes: Tensor, grid: BoundGrid, factor: Factor, *, passes: int, block: int = _BLOCK
) -> Tensor:
    """Improve codes one column at a time on the same quadratic; stops early at a fixed point.

    Every column moves to the grid's value nearest to ``q_j - ((Q - T) H)_j / H_jj``, its best value with all others
    held. The loss never rises.

    Args:
        target: float32 ``[m, n]``; codes: uint8 ``[m, n]``, both in the original column order, as is ``grid``.
        factor: order and damped Hessian.
        passes: sweeps at most.
    """
    order, hessian = factor.order, factor.hessian
    wanted, current = target[:, order].T.contiguous(), codes[:, order].T.contiguous()
    bound = grid.permuted(order)
    difference = bound.dequantize(current.T).T - wanted  # Q - T, [n, m]
    for _ in range(passes):
        before = current.clone()
        for start in range(0, len(wanted), block):
            stop = min(start + block, len(wanted))
            gradient = hessian[start:stop] @ difference
            with one_thread(gradient):
                _descend_block(
                    difference[start:stop], gradient, current[start:stop], wanted[start:stop], bound, start, factor
                )
        if torch.equal(before, current):
            break
    return _restore(current, order)


def _descend_block(
    difference: Tensor, gradient: Tensor, codes: Tensor, wanted: Tensor, grid: BoundGrid, start: int, factor: Factor
) -> None:
    scale, zero = (part.T.contiguous() for part in grid.columns(start, start + len(codes)))
    local = factor.hessian[start : start + len(codes), start : start + len(codes)]
    for j in range(len(codes)):
        best = wanted[j] + difference[j] - gradient[j] / local[j, j]
        codes[j] = grid.grid.nearest(best / scale[j] + zero[j])
        moved = (grid.grid.values(codes[j]) - zero[j]) * scale[j] - wanted[j]
        gradient.addr_(local[j], moved - difference[j])
        difference[j] = moved

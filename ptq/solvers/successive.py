"""Successive rounding: one sweep over the columns in which each takes over the errors of those before it.

Minimises ``||(T - Q) X~||^2 = ||E U||_F^2 = sum_j U_jj^2 (w_j - q_j)^2`` greedily (E = T - Q, U from `Factor`), with

    w_j = T_j + sum_{k before j} (T_k - Q_k) U_kj / U_jj ,        q_j = the grid's value nearest to w_j.

With T = W this is GPTQ (LDLQ; Babai's nearest plane), with T = the mismatch-corrected target it is CoreQ. GPTAQ is the
same sweep with a target that drifts: ``T_j`` is replaced by ``T_j + sum_{k before j} w_k P_kj``.

A grid may round several neighbouring columns of a row together (a vector codebook): the compensated columns of such a
tuple are then

    w_T = T_T + (sum_{k before T} (T_k - Q_k) U_kT) U_TT^-1 ,        q_T = the codebook's entry nearest to w_T,

and the tuple is processed as one step, in the original order inside it.

Work: products of m n^2 / 2 multiply-adds in blocks within blocks, plus a few vector operations a column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from calib.precision import product
from ptq.errors import UsageError
from ptq.grids import Grid, ScaledGrid
from ptq.solvers.cholesky import Factor
from ptq.solvers.cpu_threads import one_thread
from ptq.solvers.cuda_graph import Replayed

__all__ = ["GridFitter", "coordinate_descent", "quadratic", "successive_rounding", "sweep_flops"]

_BLOCK = 128  # columns a product is delayed for; a multiple of common group sizes
_INNER = 32  # columns inside a block that take over errors one by one
GridFitter = Callable[[int, int, Tensor], ScaledGrid]
"""``(start, stop, columns)`` -> the grid to use from ``start`` on; ``columns`` are those, errors added."""


def successive_rounding(
    target: Tensor,
    grid: ScaledGrid,
    factor: Factor,
    *,
    drift: Tensor | None = None,
    refit: GridFitter | None = None,
    block: int = _BLOCK,
) -> tuple[Tensor, ScaledGrid]:
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
    if grid.columns > 1:
        return _round_tuples(target, grid, factor, drift, refit)
    order = factor.order
    wanted = target.index_select(1, order).T.contiguous()  # [n, m]: a column of the weight is a contiguous row here
    grid = grid.permuted(order)
    sweep = _Sweep(wanted, factor, drift)
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)
    for start in range(0, len(wanted), block):
        stop = min(start + block, len(wanted))
        columns = wanted[start:stop].clone()
        sweep.compensate(columns, 0, start)
        if refit is not None:
            grid = refit(start, stop, columns.T)
        with one_thread(columns):
            codes[start:stop] = sweep.round_block(columns, start, grid)
    return _restore(codes, order), grid


def _round_tuples(
    target: Tensor, grid: ScaledGrid, factor: Factor, drift: Tensor | None, refit: GridFitter | None
) -> tuple[Tensor, ScaledGrid]:
    """`successive_rounding` for grids that round ``grid.columns`` columns together; codes ``[m, n / columns]``."""
    size, width = grid.columns, target.shape[1]
    if drift is not None or refit is not None:
        raise UsageError("a grid that rounds columns together takes neither a drifting target nor scales refitted.")
    if width % size or not torch.equal(factor.order, torch.arange(width, device=factor.order.device)):
        raise UsageError(
            f"a grid that rounds {size} columns together needs columns in their natural order and a multiple of {size} "
            f"of them, got {width}: set the option that orders columns to natural (act_order=false, order=natural)."
        )
    codes = torch.empty(len(target), width // size, dtype=torch.uint8, device=target.device)
    errors = torch.zeros_like(target)
    for start in range(0, width, size):
        part = slice(start, start + size)
        taken = product(errors[:, :start], factor.upper[:start, part])
        step = torch.linalg.solve_triangular(factor.upper[part, part], taken, upper=True, left=False)
        codes[:, start // size] = grid.round_columns(target[:, part] + step, start)
        errors[:, part] = target[:, part] - grid.value_columns(codes[:, start // size], start)
    return codes, grid


def sweep_flops(rows: int, width: int) -> int:
    """Floating-point operations of `successive_rounding` (without a drift; one with a drift takes twice as many)."""
    return rows * width * width


class _Sweep:
    """The state of one sweep. Everything is ``[n, m]`` in processing order.

    Args:
        wanted: T, which drifts with ``drift``; factor, drift: see `successive_rounding`.
    """

    def __init__(self, wanted: Tensor, factor: Factor, drift: Tensor | None) -> None:
        self.wanted, self.upper, self.pivots, self.drift = wanted, factor.upper, factor.pivots, drift
        self.errors = torch.empty_like(wanted)  # T - Q of the columns done so far
        self.seen = torch.zeros_like(wanted) if drift is not None else None  # w, before rounding
        self._graph: Replayed | None = None

    def compensate(self, columns: Tensor, first: int, start: int) -> None:
        """Let ``columns`` (``start ..``, in place) take over what columns ``first .. start`` left."""
        if first == start:
            return
        stop = start + len(columns)
        if self.drift is not None and self.seen is not None:
            moved = product(self.drift[first:start, start:stop].T, self.seen[first:start])
            self.wanted[start:stop] += moved
            columns += moved
        taken = product(self.upper[first:start, start:stop].T, self.errors[first:start])
        columns.addcdiv_(taken, self.pivots[start:stop, None])

    def round_block(self, columns: Tensor, start: int, grid: ScaledGrid) -> Tensor:
        """Codes of a block of columns, which have taken over everything from before the block."""
        group = grid.group[start : start + len(columns)]
        scale, zero = (part.T.contiguous().index_select(0, group) for part in (grid.scale, grid.zero))
        levels = torch.empty_like(columns)
        for first in range(0, len(columns), _INNER):
            part = slice(first, first + _INNER)
            self.compensate(columns[part], start, start + first)
            levels[part] = self._round_inner(columns[part], start + first, grid.grid, scale[part], zero[part])
        return grid.grid.codes_of(levels)

    def _round_inner(self, columns: Tensor, start: int, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
        """Levels of a few columns.

        Until its turn comes, a column's row of errors holds what its level is to be subtracted from.
        """
        stop = start + len(columns)
        steps = (self.upper[start:stop, start:stop] / self.pivots[start:stop]).triu_(1).T.contiguous()
        errors = self.errors[start:stop]
        torch.addcmul(self.wanted[start:stop], zero, scale, out=errors)
        levels = torch.addcdiv(zero, columns, scale)
        if self.drift is None:
            self._one_by_one(grid, steps, levels, scale, errors)
        else:
            self._drifting(grid, steps, levels, scale, errors, columns, start)
        return levels

    def _one_by_one(self, grid: Grid, *tensors: Tensor) -> None:
        """`_round_columns`; on a GPU as a graph, which is recorded once a sweep."""
        if not tensors[0].is_cuda or grid.levels.device != tensors[0].device:
            _round_columns(_snapping(grid), *tensors)
            return
        if self._graph is None or not self._graph.fits(*tensors):
            self._graph = Replayed(functools.partial(_round_columns, _snapping(grid)), *tensors)
        self._graph(*tensors)

    def _drifting(
        self, grid: Grid, steps: Tensor, levels: Tensor, scale: Tensor, errors: Tensor, columns: Tensor, start: int
    ) -> None:
        """`_round_columns` with a target that follows the columns before rounding (GPTAQ)."""
        assert self.drift is not None
        assert self.seen is not None
        stop, snap = start + len(columns), _snapping(grid)
        seen, drifts = self.seen[start:stop], self.drift[start:stop, start:stop].T.contiguous()
        for j, step in enumerate(steps):
            moved = torch.mv(seen.T, drifts[j])
            errors[j] += moved
            taken = torch.mv(errors.T, step).add_(moved)
            torch.add(columns[j], taken, out=seen[j])
            snap(levels[j].addcdiv_(taken, scale[j]))
            errors[j].addcmul_(levels[j], scale[j], value=-1.0)


def _round_columns(
    snap: Callable[[Tensor], object], steps: Tensor, levels: Tensor, scale: Tensor, errors: Tensor
) -> None:
    """One column after the other: five operations each, whose calls are what this loop costs.

    Every column takes the errors of the whole inner block times its column of the factor, which is zero from the
    diagonal on.

    Args:
        snap: moves numbers to their levels, in place.
        steps: ``[k, k]``, row j is what column j takes over of each column's error.
        levels: ``[k, m]``, in units of the scale; become levels. scale: likewise.
        errors: ``[k, m]``, the value that a level of 0 would leave; become the errors.
    """
    errors_t, taken = errors.T, torch.empty_like(levels[0])
    rows = zip(*(part.unbind() for part in (steps, levels, scale, errors)), strict=True)
    for step, level, s, error in rows:
        torch.mv(errors_t, step, out=taken)
        snap(level.addcdiv_(taken, s))
        error.addcmul_(level, s, value=-1.0)


def _snapping(grid: Grid) -> Callable[[Tensor], object]:
    """A function that moves numbers in units of the scale to their nearest levels, in place."""
    if not grid.uniform:
        return lambda x: x.copy_(grid.snap(x))
    top = len(grid.levels) - 1
    return lambda x: x.round_().clamp_(0, top)


def _restore(codes: Tensor, order: Tensor) -> Tensor:
    """``[n, m]`` in processing order to ``[m, n]`` in the original order."""
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def quadratic(difference: Tensor, factor: Factor) -> Tensor:
    """``||(T - Q) U||^2`` of every row, float32 ``[m]``, for ``difference`` T - Q ``[m, n]`` in the original order."""
    return product(difference[:, factor.order], factor.upper).square_().sum(1)


def coordinate_descent(
    target: Tensor, codes: Tensor, grid: ScaledGrid, factor: Factor, *, passes: int, block: int = _BLOCK
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
            gradient = product(hessian[start:stop], difference)
            with one_thread(gradient):
                local = hessian[start:stop, start:stop]
                _descend_block(
                    difference[start:stop], gradient, current[start:stop], wanted[start:stop], bound, start, local
                )
        if torch.equal(before, current):
            break
    return _restore(current, order)


def _descend_block(
    difference: Tensor, gradient: Tensor, codes: Tensor, wanted: Tensor, grid: ScaledGrid, start: int, local: Tensor
) -> None:
    scale, zero = (part.T.contiguous() for part in grid.scale_of(start, start + len(codes)))
    for j in range(len(codes)):
        best = wanted[j] + difference[j] - gradient[j] / local[j, j]
        codes[j] = grid.grid.nearest(best / scale[j] + zero[j])
        moved = (grid.grid.values(codes[j]) - zero[j]) * scale[j] - wanted[j]
        gradient.addr_(local[j], moved - difference[j])
        difference[j] = moved

"""Beam search for the same quadratic as successive rounding: K partial roundings a row instead of one (K-CoreQ).

Columns are taken in the factor's order. A branch of beam b with code c costs ``U_jj^2 (w_j - level_c)^2`` more, where
w_j is that beam's own compensated column; the K cheapest of all branches survive. Costs add up to the exact objective
``||(T - Q) U||^2``. Only the K nearest codes of a beam can be among the K cheapest branches, so no others are expanded.

Memory: codes are uint8, ``K n`` bytes a row; rows go in chunks. Inside a block parents are followed at once, across
blocks once a block, so that histories are gathered ``n / block`` times and not n times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.grids import ScaledGrid
from ptq.solvers.cholesky import Factor
from ptq.solvers.cpu_threads import one_thread
from ptq.solvers.successive import quadratic, successive_rounding, sweep_flops

__all__ = ["beam_flops", "beam_search"]

_BLOCK = 32
_CHUNK_BYTES = 1 << 28


def beam_search(target: Tensor, grid: ScaledGrid, factor: Factor, *, width: int) -> Tensor:
    """Round ``target`` with ``width`` beams a row; every row keeps the better of beam search and greedy rounding.

    Args:
        target: float32 ``[m, n]`` in the original column order, as is ``grid``.
        factor: order and triangular factor.
        width: beams K; 1 is greedy successive rounding.

    Returns:
        Codes uint8 ``[m, n]`` in the original column order.
    """
    greedy, _ = successive_rounding(target, grid, factor)
    if width == 1:
        return greedy
    rows = max(1, _CHUNK_BYTES // (width * target.shape[1] * 5))  # float errors of one chunk and its codes
    parts = [
        _search_rows(target[start : start + rows], grid.rows(start, start + rows), factor, width)
        for start in range(0, len(target), rows)
    ]
    found = torch.cat(parts)
    score = quadratic(target - grid.dequantize(found), factor)
    better = score < quadratic(target - grid.dequantize(greedy), factor)
    return torch.where(better[:, None], found, greedy)


def beam_flops(rows: int, width: int, beams: int) -> int:
    """Floating-point operations of `beam_search`: greedy rounding, the beams' products, the two losses compared."""
    return sweep_flops(rows, width) + (beams + 4) * rows * width * width


def _search_rows(target: Tensor, grid: ScaledGrid, factor: Factor, width: int) -> Tensor:
    """The best of ``width`` beams for a chunk of rows, codes uint8 ``[r, n]`` in the original column order."""
    grid, wanted = grid.permuted(factor.order), target[:, factor.order]
    rows, columns = wanted.shape
    feed, pivots = factor.unit_upper(), factor.pivots
    codes = torch.zeros(rows * width, columns, dtype=torch.uint8, device=wanted.device)
    errors = torch.zeros(rows * width, columns, device=wanted.device)
    cost = torch.full((rows, width), torch.inf, device=wanted.device)
    cost[:, 0] = 0.0
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        base = wanted[:, start:stop].repeat_interleave(width, 0)
        state = _Block(base, torch.addmm(base, errors[:, :start], feed[:start, start:stop]), codes, errors)
        with one_thread(state.columns):
            cost = _advance(state, grid, start, feed[start:stop, start:stop], pivots[start:stop], cost)
        codes, errors = state.finish(start, stop)
    best = cost.argmin(1) + torch.arange(rows, device=cost.device) * width
    return factor.restore(codes[best])


class _Block:
    """The beams of all rows inside one block of columns; row ``r * width + k`` is beam k of row r."""

    def __init__(self, wanted: Tensor, columns: Tensor, codes: Tensor, errors: Tensor) -> None:
        self.wanted, self.columns = wanted, columns  # [r * K, block]; wanted is the same for all beams of a row
        self.history = codes, errors
        self.origin = torch.arange(len(columns), device=columns.device)
        self.codes = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
        self.errors = torch.zeros_like(columns)

    def follow(self, parent: Tensor, j: int) -> None:
        """Every beam continues its parent (int64 ``[r * K]``, rows of this block)."""
        self.columns, self.origin = self.columns[parent], self.origin[parent]
        self.codes[:, :j], self.errors[:, :j] = self.codes[parent, :j], self.errors[parent, :j]

    def finish(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Histories with this block appended, each beam behind its own past."""
        codes, errors = self.history
        codes[:, :start], errors[:, :start] = codes[self.origin, :start], errors[self.origin, :start]
        codes[:, start:stop], errors[:, start:stop] = self.codes, self.errors
        return codes, errors


def _advance(state: _Block, grid: ScaledGrid, start: int, feed: Tensor, pivots: Tensor, cost: Tensor) -> Tensor:
    """Take all columns of a block; returns the cost of the surviving beams ``[r, K]``."""
    rows, width = cost.shape
    scale, zero = grid.scale_of(start, start + len(pivots))
    table = grid.grid
    branches = min(width, len(table.levels))
    first_beam = torch.arange(rows, device=cost.device)[:, None] * width
    for j in range(len(pivots)):
        s, z = scale[:, j, None], zero[:, j, None]
        column = state.columns[:, j].view(rows, width)
        options = table.nearest_several(column / s + z, branches)  # [r, K, c]
        value = (table.values(options) - z[..., None]) * s[..., None]
        branch_cost = cost[..., None] + ((column[..., None] - value) * pivots[j]).square_()
        cost, pick = branch_cost.view(rows, -1).topk(width, dim=1, largest=False, sorted=False)
        state.follow((first_beam + pick // branches).flatten(), j)
        state.codes[:, j] = options.view(rows, -1).gather(1, pick).flatten()
        state.errors[:, j] = state.wanted[:, j] - value.view(rows, -1).gather(1, pick).flatten()
        state.columns[:, j + 1 :].addcmul_(state.errors[:, j, None], feed[j, None, j + 1 :])
    return cost

"""Layer-wise allocation as published: blocks ranked by importance, the upper part at the higher of two levels.

Source: Layer-Wise Quantization (arXiv 2406.17415).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ptq.allocation.problem.items import Table
from ptq.allocation.problem.solver import Allocation
from ptq.errors import UsageError

__all__ = ["two_levels"]


def two_levels(
    table: Table, importance: Mapping[str, float], blocks: Sequence[str], limit: float | None, fraction: float | None
) -> Allocation:
    """Raise whole blocks from the lower to the higher level, the most important first.

    With more than two candidates the levels are the largest that all blocks can have within the limit, and the next.

    Args:
        table: costs, and infinite scores where a format is not allowed; nothing else of the scores is read.
        importance: by block; empty raises none (one format for all).
        blocks: all of them, in the model's order.
        limit: of the cost in bits.
        fraction: of the blocks at the higher level, instead of a limit.

    Raises:
        UsageError: the limit is below the lower level, or there are not two levels.
    """
    bits = table.bits
    order = [int(column) for column in np.argsort(bits.sum(0), kind="stable")]
    low, high = _levels(table, order, limit)
    choice = _at(table, low)
    ranked = sorted(importance, key=lambda name: -importance[name])  # stable: equal ones in the model's order
    most = len(blocks) if fraction is None else round(fraction * len(blocks))
    upper = _at(table, high)
    for name in ranked[:most]:
        rows = [row for row, item in enumerate(table.items) if item.linears[0].name.startswith(f"{name}.")]
        trial = choice.copy()
        trial[rows] = upper[rows]
        if limit is not None and _cost(bits, trial) > limit * (1 + 1e-9):
            break
        choice = trial
    return Allocation(choice, float("nan"), _cost(bits, choice), float("nan"), "two levels")


def _levels(table: Table, order: list[int], limit: float | None) -> tuple[int, int]:
    """The lower and the higher level, as columns."""
    if limit is None:
        if len(order) != 2:
            raise UsageError(f"--fraction needs exactly two candidates, a higher and a lower level; got {len(order)}.")
        return order[0], order[1]
    fitting = [
        place for place, column in enumerate(order) if _cost(table.bits, _at(table, column)) <= limit * (1 + 1e-9)
    ]
    if not fitting:
        raise UsageError("the budget is below the lowest level.")
    place = fitting[-1]
    return order[place], order[min(place + 1, len(order) - 1)]


def _at(table: Table, column: int) -> NDArray[np.int64]:
    """The format of that column for every item; where limits exclude it, the cheapest allowed one above, else below."""
    allowed = np.isfinite(table.scores)
    choice = np.full(len(table.items), column, dtype=np.int64)
    for row in np.flatnonzero(~allowed[:, column]):
        columns = [int(c) for c in np.argsort(table.bits[row]) if allowed[row, c]]
        above = [c for c in columns if table.bits[row, c] >= table.bits[row, column]]
        choice[row] = above[0] if above else columns[-1]
    return choice


def _cost(bits: NDArray[np.float64], choice: NDArray[np.int64]) -> float:
    return float(bits[np.arange(len(choice)), choice].sum())

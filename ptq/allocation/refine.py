"""Refinement: what a step up or down costs *in the mixed model*, and the problem solved again with that.

Scores predict what every linear costs alone. Below about three bits errors compound, and the sum of predictions is too
low, by an amount that differs from linear to linear. A round of refinement

1. rounds all linears as the current allocation says and measures, for every item, the KL with it one format up and one
   format down (only what comes after it is run again);
2. stretches the item's scores above and below its current format so that half of the difference to what was measured
   is made up;
3. solves again, where at most a tenth of all bits may move;
4. keeps the new allocation only if the KL on held-out tokens falls significantly: a paired t-test over pieces
   of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_rel
from torch import Tensor

from calib.checkpoint.reader import ModelSource
from calib.checkpoint.resident import ResidentSource
from calib.gradients import GradientPasses, NewStore
from calib.model.structure import linear_weight, set_linear_weight
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.candidates import Candidate, rounding_errors
from ptq.allocation.problem.items import Item, Table
from ptq.allocation.problem.solver import Allocation, Problem, solve
from ptq.allocation.progress import Steps
from ptq.allocation.setting import Setting

__all__ = ["Refiner", "significantly_lower"]

_TOKENS = 2048  # of the scores' tokens that marginals are measured on: the full model's logits of these are kept
_DAMPING = 0.5
_MOVED = 0.1  # of all bits, in one round
_PIECE = 64  # tokens that count as one observation
_LEVEL = 0.05

Measure = Callable[[Allocation], NDArray[np.float64]]
Budgets = tuple[tuple[NDArray[np.float64], float], ...]


def significantly_lower(new: NDArray[np.float64], old: NDArray[np.float64]) -> bool:
    """Whether KL per token ``[sequences, tokens]`` fell, by a paired one-sided t-test over pieces of 64 tokens."""
    size = min(_PIECE, new.shape[1])
    pieces = [kl[:, : kl.shape[1] // size * size].reshape(-1, size).mean(1) for kl in (new, old)]
    if len(pieces[0]) < 2 or np.ptp(pieces[0] - pieces[1]) == 0:
        return bool((pieces[0] < pieces[1]).all())
    return bool(ttest_rel(*pieces, alternative="less").pvalue < _LEVEL)


class Refiner:
    """Rounds of refinement of one planner's allocations; the whole model is in memory.

    Args:
        items: what formats are chosen for.
        setting: model, candidates, device.
        tokens: int64 ``[sequences, seqlen]``, those of the scores.
        new_store: makes stores of hidden states.
        steps: told after every item.
    """

    def __init__(
        self,
        items: Sequence[Item],
        setting: Setting,
        tokens: Tensor,
        new_store: NewStore,
        steps: Steps,
    ) -> None:
        self._items, self._setting, self._steps, self._new_store = items, setting, steps, new_store
        self._tokens = tokens[: max(1, _TOKENS // tokens.shape[1])]

    def refine(
        self, table: Table, allocation: Allocation, limit: float, rounds: int, measure: Measure, more: Budgets = ()
    ) -> tuple[Allocation, list[str]]:
        """The allocation after at most so many rounds, and sentences on what they did.

        Args:
            table: scores and costs; its ``bits`` are what the limit is about.
            allocation: where to begin.
            limit: of the cost.
            rounds: at most; the first that does not help is the last.
            measure: KL per held-out token of an allocation.
            more: further costs and limits that every round keeps.
        """
        notes: list[str] = []
        scores, current = table.scores, measure(allocation)
        for number in range(1, rounds + 1):
            scores = self._stretched(table, scores, allocation, *self._marginals(table, allocation))
            proposed = self._solve(table, scores, allocation, limit, more)
            if (proposed.choice == allocation.choice).all():
                notes.append(f"refinement {number}: no linear changes its format")
                break
            new = measure(proposed)
            words = f"held-out KL {current.mean():.4g} -> {new.mean():.4g}"
            if not significantly_lower(new, current):
                notes.append(f"refinement {number} is not taken: {words}, which is not a significant fall")
                break
            moved = int((proposed.choice != allocation.choice).sum())
            notes.append(f"refinement {number}: {moved} items change their format, {words}")
            allocation, current = proposed, new
        return allocation, notes

    def _solve(
        self, table: Table, scores: NDArray[np.float64], now: Allocation, limit: float, more: Budgets
    ) -> Allocation:
        rows = np.arange(len(self._items))
        distance = np.abs(table.bits - table.bits[rows, now.choice][:, None])
        region = (distance, _MOVED * float(table.bits[rows, now.choice].sum()))
        return solve(Problem(scores, table.bits, limit, (region, *more)), "milp")

    def _stretched(
        self,
        table: Table,
        scores: NDArray[np.float64],
        allocation: Allocation,
        below: NDArray[np.float64],
        above: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Scores whose steps from the current format are, half of the way, those that were measured."""
        result = scores.copy()
        for row, column in enumerate(allocation.choice):
            order = _ladder(table, row)
            place = order.index(int(column))
            for side, marginal in ((-1, below[row]), (1, above[row])):
                other = place + side
                if not 0 <= other < len(order) or np.isnan(marginal):
                    continue
                predicted = scores[row, order[other]] - scores[row, column]
                measured = max(marginal, 0.0) if side < 0 else min(marginal, 0.0)
                ratio = measured / predicted if predicted else 1.0
                factor = (1 - _DAMPING) + _DAMPING * ratio
                for far in order[other:] if side > 0 else order[: other + 1]:
                    result[row, far] = scores[row, column] + factor * (scores[row, far] - scores[row, column])
        return np.where(np.isfinite(result), result - min(0.0, float(result[np.isfinite(result)].min())), np.inf)

    def _marginals(self, table: Table, allocation: Allocation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """By item, the change of the mixed model's KL with the item one format down, and one up."""
        s = self._setting
        resident = ResidentSource(s.source)
        source = cast(ModelSource, resident)
        changes = np.full((2, len(self._items)), np.nan)
        passes = GradientPasses(source, self._tokens, device=s.device, dtype=s.dtype, new_store=self._new_store)
        try:
            passes.forward()
            with passes.head(), torch.no_grad():
                full = [passes.logits(*place).cpu() for place in passes.sequences()]
                originals = {one.name: _weight(source, one.name) for item in self._items for one in item.linears}
                for item, column in zip(self._items, allocation.choice, strict=True):
                    self._set(source, item, s.candidates[int(column)], originals)
                passes.close()
                passes.forward()
                here = _kl(passes, 0, full)
                self._steps.begin("items: KL with each one format down and one up", len(self._items))
                for row, item in enumerate(self._items):
                    order, now = _ladder(table, row), int(allocation.choice[row])
                    block = next(
                        i for i, n in enumerate(passes.block_names) if item.linears[0].name.startswith(f"{n}.")
                    )
                    for side, place in enumerate((order.index(now) - 1, order.index(now) + 1)):
                        if 0 <= place < len(order):
                            self._set(source, item, s.candidates[order[place]], originals)
                            changes[side, row] = _kl(passes, block, full) - here
                    self._set(source, item, s.candidates[now], originals)
                    self._steps(item.name)
        finally:
            passes.close()
            resident.close()
        return changes[0], changes[1]

    def _set(self, source: ModelSource, item: Item, candidate: Candidate, originals: dict[str, Tensor]) -> None:
        for one in item.linears:
            weight = originals[one.name].float()
            (error,) = rounding_errors(weight, (candidate,))
            set_linear_weight(source.skeleton.get_submodule(one.name), (weight + error).to(self._setting.dtype))


def _ladder(table: Table, row: int) -> list[int]:
    """Allowed formats of an item from the cheapest to the costliest."""
    return [int(c) for c in np.argsort(table.bits[row], kind="stable") if np.isfinite(table.scores[row, c])]


def _weight(source: ModelSource, name: str) -> Tensor:
    return linear_weight(source.skeleton.get_submodule(name)).detach()


def _kl(passes: GradientPasses, block: int, full: Sequence[Tensor]) -> float:
    """KL per token from the full model's logits, of the model with the weights that it has now."""
    rows = (one for number in range(len(passes.tokens)) for one in passes.logits_from(block, number))
    values = [float(token_kl(base.to(one.device), one).double().mean()) for base, one in zip(full, rows, strict=True)]
    return float(np.mean(values))

"""Solvers of the allocation problem: one format per item, least predicted loss within a budget.

    minimize   sum_i s[i, choice_i]      subject to   sum_i c[i, choice_i] <= budget

a multiple-choice knapsack. Three solvers, one signature:

    milp         branch and bound (HiGHS through `scipy.optimize.milp`); exact to a gap; further budgets as more rows
    lagrangian   bisection on the price of a bit, then repair; its dual bound says how far from the optimum it can be
    greedy       the steepest steps along every item's lower convex hull while they fit

An entry of infinite score is a format that the item may not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from ptq.errors import UsageError, unknown_name

__all__ = ["SOLVERS", "Allocation", "Problem", "check_solver", "solve"]

Matrix = NDArray[np.float64]
_GAP = 1e-4
_TIME_LIMIT = 60.0  # seconds
_BISECTIONS = 100
_SLACK = 1e-9  # of the budget, for sums of floating-point costs


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be chosen.

    Args:
        scores: predicted loss ``[items, formats]``; infinite where the format is not allowed.
        costs: what each takes from the budget, ``[items, formats]``.
        budget: the most that all items may take together.
        more: further costs with their budgets (bit operations, latency); only ``milp`` takes them.
    """

    scores: Matrix
    costs: Matrix
    budget: float
    more: tuple[tuple[Matrix, float], ...] = ()

    def cost(self, choice: NDArray[np.int64]) -> float:
        """What a choice takes from the budget."""
        return float(self.costs[np.arange(len(choice)), choice].sum())

    def score(self, choice: NDArray[np.int64]) -> float:
        """The predicted loss of a choice."""
        return float(self.scores[np.arange(len(choice)), choice].sum())

    @property
    def limit(self) -> float:
        """The budget with room for rounding of sums."""
        return self.budget + _SLACK * abs(self.budget)

    @property
    def allowed(self) -> NDArray[np.bool_]:
        return np.isfinite(self.scores)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A solution.

    Args:
        choice: number of the format of every item.
        score: predicted loss.
        cost: of the budget.
        bound: no choice within the budget has a lower predicted loss than this.
        solver: which one found it.
    """

    choice: NDArray[np.int64]
    score: float
    cost: float
    bound: float
    solver: str


def check_solver(solver: str, *, more_budgets: bool) -> None:
    """Check a solver's name.

    Raises:
        UsageError: there is none of that name, or it takes one budget and there are more.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    if more_budgets and solver != "milp":
        raise UsageError(f"the solver {solver!r} takes one budget; for bit operations or latency use milp.")


def solve(problem: Problem, solver: str = "milp") -> Allocation:
    """Solve with the solver of that name.

    Raises:
        UsageError: an unknown solver, no choice fits the budget, or budgets that the solver does not take.
    """
    check_solver(solver, more_budgets=bool(problem.more))
    least = np.where(problem.allowed, problem.costs, np.inf).min(1)
    if not np.isfinite(least).all():
        raise UsageError("an item has no format that its limits allow.")
    if least.sum() > problem.limit:
        raise UsageError(f"the budget of {problem.budget:.6g} is below the least possible cost, {least.sum():.6g}.")
    choice, bound = SOLVERS[solver](problem)
    return Allocation(choice, problem.score(choice), problem.cost(choice), bound, solver)


def _milp(problem: Problem) -> tuple[NDArray[np.int64], float]:
    items, formats = problem.scores.shape
    scores = np.where(problem.allowed, problem.scores, 0.0)
    scale = float(scores.max()) or 1.0  # scores span many decades, solvers have absolute tolerances
    one_each = csr_matrix(
        (np.ones(items * formats), (np.repeat(np.arange(items), formats), np.arange(items * formats)))
    )
    rows, upper = [one_each], [np.ones(items)]
    for costs, budget in ((problem.costs, problem.limit), *problem.more):
        unit = float(np.abs(costs).max()) or 1.0
        rows.append(csr_matrix(costs.ravel()[None] / unit))
        upper.append(np.array([budget / unit]))
    high = np.concatenate(upper)
    low = np.concatenate([np.ones(items), np.full(len(high) - items, -np.inf)])
    with _silent_stdout():
        result: Any = milp(
            scores.ravel() / scale,
            constraints=LinearConstraint(vstack(rows), low, high),
            integrality=np.ones(items * formats),
            bounds=Bounds(0, problem.allowed.ravel().astype(float)),
            options={"time_limit": _TIME_LIMIT, "mip_rel_gap": _GAP},
        )
    if result.x is None:
        raise UsageError(f"no choice of formats meets all budgets together ({result.message}).")
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
    return result.x.reshape(items, formats).argmax(1).astype(np.int64), float(bound) * scale


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS prints a line of its own in rare cases, past Python, where only JSON may stand."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        sys.stdout.flush()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _lagrangian(problem: Problem) -> tuple[NDArray[np.int64], float]:
    """Bisect the price of a unit of cost; the prices seen give the dual bound."""
    scores = problem.scores
    costs = np.where(problem.allowed, problem.costs, 0.0)
    low, high = 0.0, _highest_price(problem)
    best, bound = _pick(scores, costs, high), -np.inf
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        choice = _pick(scores, costs, price)
        bound = max(bound, float((scores + price * costs).min(1).sum()) - price * problem.budget)
        if problem.cost(choice) <= problem.limit:
            best, high = choice, price
        else:
            low = price
    free = _pick(scores, costs, 0.0)
    if problem.cost(free) <= problem.limit:
        return free, problem.score(free)
    return _spend(problem, best), bound


def _pick(scores: Matrix, costs: Matrix, price: float) -> NDArray[np.int64]:
    """The best format of every item at a price; of equal ones the cheapest."""
    total = scores + price * costs
    tied = total <= total.min(1, keepdims=True) + 1e-15 * np.abs(total.min(1, keepdims=True))
    picked: NDArray[np.int64] = np.where(tied, costs, np.inf).argmin(1).astype(np.int64)
    return picked


def _highest_price(problem: Problem) -> float:
    """A price at which every item has its cheapest format."""
    finite = problem.scores[problem.allowed]
    steps = np.unique(problem.costs)
    gap = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    return (float(finite.max() - finite.min()) + 1e-300) / gap * 2


def _spend(problem: Problem, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """Use what is left of the budget for the upgrades with the largest gain per cost."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    while True:
        room = problem.limit - problem.cost(choice)
        extra = problem.costs - problem.costs[rows, choice][:, None]
        gain = problem.scores[rows, choice][:, None] - problem.scores
        fits = problem.allowed & (extra <= room) & (gain > 0)
        if not fits.any():
            return choice
        rate = np.where(fits, gain / np.maximum(extra, 1e-12), -np.inf)
        item, new = np.unravel_index(int(rate.argmax()), rate.shape)
        choice[item] = new


def _greedy(problem: Problem) -> tuple[NDArray[np.int64], float]:
    """Steps along the hulls in the order of their slope, while they fit; then what still fits."""
    steps: list[tuple[float, int, int, int]] = []
    choice = np.zeros(len(problem.scores), dtype=np.int64)
    for item in range(len(problem.scores)):
        hull = _hull(problem.scores[item], problem.costs[item])
        choice[item] = hull[0]
        for before, after in itertools.pairwise(hull):
            gain = problem.scores[item, before] - problem.scores[item, after]
            slope = gain / (problem.costs[item, after] - problem.costs[item, before])
            steps.append((-float(slope), item, before, after))
    left = problem.limit - problem.cost(choice)
    stopped: set[int] = set()
    for _, item, before, after in sorted(steps):
        extra = problem.costs[item, after] - problem.costs[item, before]
        if item in stopped or extra > left:
            stopped.add(item)  # later steps of this item start from one that was not taken
            continue
        choice[item], left = after, left - extra
    return _spend(problem, choice), -np.inf


def _hull(scores: Matrix, costs: Matrix) -> list[int]:
    """Formats on the lower convex hull of score over cost, the cheapest first, scores falling."""
    hull: list[int] = []
    for new in (int(i) for i in np.lexsort((scores, costs)) if np.isfinite(scores[i])):
        if hull and scores[new] >= scores[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(scores, costs, hull[-2], hull[-1]) >= _slope(scores, costs, hull[-2], new):
            hull.pop()
        hull.append(new)
    return hull


def _slope(scores: Matrix, costs: Matrix, before: int, after: int) -> float:
    return float((scores[after] - scores[before]) / max(costs[after] - costs[before], 1e-300))


SOLVERS: dict[str, Callable[[Problem], tuple[NDArray[np.int64], float]]] = {
    "milp": _milp,
    "lagrangian": _lagrangian,
    "greedy": _greedy,
}
"""By name."""

"""Solvers against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.allocation.problem.solver import SOLVERS, Problem, solve
from ptq.errors import UsageError


def random_problem(seed: int, items: int = 5, formats: int = 3) -> Problem:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 9, items)[:, None]
    bits = np.arange(2, 2 + formats)
    scores = draw.lognormal(size=(items, 1)) * 4.0**-bits * sizes * draw.uniform(0.8, 1.2, (items, formats))
    scores = np.minimum.accumulate(scores, 1)
    if seed % 3 == 0:
        scores[draw.integers(items), 0] = np.inf  # a limit
    costs = (sizes * bits).astype(float)
    least = np.where(np.isfinite(scores), costs, np.inf).min(1).sum()
    return Problem(scores, costs, float(draw.uniform(least, costs.max(1).sum())))


def best_of_all(problem: Problem) -> float:
    items, formats = problem.scores.shape
    choices = (np.array(choice) for choice in itertools.product(range(formats), repeat=items))
    return min(problem.score(choice) for choice in choices if problem.cost(choice) <= problem.limit)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_milp_finds_the_best_of_all_choices_and_the_others_stay_within_budget(seed: int) -> None:
    problem = random_problem(seed)
    best = best_of_all(problem)
    found = {name: solve(problem, name) for name in SOLVERS}
    assert found["milp"].score == pytest.approx(best, rel=2e-4)
    for name, allocation in found.items():
        assert allocation.cost <= problem.limit, name
        assert allocation.score >= best * (1 - 1e-9), name
        assert allocation.bound <= best * (1 + 1e-6), name


def test_solvers_agree_on_a_large_problem() -> None:
    problem = random_problem(1, items=224, formats=6)
    problem = Problem(problem.scores, problem.costs, float(problem.costs[:, 2].sum()))
    exact = solve(problem, "milp")
    for name in ("lagrangian", "greedy"):
        assert solve(problem, name).score <= exact.score * 1.02
    assert solve(problem, "lagrangian").bound >= exact.score * 0.98


def test_a_second_budget_is_kept() -> None:
    problem = random_problem(1)
    operations = problem.costs * 8
    both = Problem(problem.scores, problem.costs, problem.costs.max(1).sum(), ((operations, operations[:, 1].sum()),))
    found = solve(both, "milp")
    assert operations[np.arange(5), found.choice].sum() <= operations[:, 1].sum() + 1e-6
    with pytest.raises(UsageError, match="takes one budget"):
        solve(both, "greedy")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_below_the_cheapest_choice_is_refused(solver: str) -> None:
    problem = random_problem(1)
    with pytest.raises(UsageError, match="below the least possible cost"):
        solve(Problem(problem.scores, problem.costs, 1.0), solver)


def test_a_budget_for_everything_gives_every_item_its_best() -> None:
    problem = random_problem(1)
    for solver in SOLVERS:
        found = solve(Problem(problem.scores, problem.costs, problem.costs.max(1).sum()), solver)
        assert found.score == pytest.approx(problem.scores.min(1).sum())

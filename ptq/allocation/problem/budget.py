"""Budgets: what a plan may weigh or lose, and the sentence for one that cannot be met."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from ptq.allocation.problem.items import Table
from ptq.allocation.problem.solver import Allocation, Problem, solve
from ptq.errors import UsageError

__all__ = ["Budget", "budget_limit", "fit_budget", "further_budgets", "held_below", "parse_size"]

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclasses.dataclass(frozen=True)
class Budget:
    """One target; the others are ``None``.

    Args:
        bpw: real bits per weight, scales and zero points included, over the linears of the plan.
        size: bytes of all weight files.
        max_kl: predicted KL divergence in nats per token; the smallest plan that keeps it is looked for.
        fraction: of the blocks at the higher of two levels (scores that rank blocks only).
        bitops: fraction of the way from the least to the most bit operations, besides the target above.
    """

    bpw: float | None = None
    size: int | None = None
    max_kl: float | None = None
    fraction: float | None = None
    bitops: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("bpw", "size", "max_kl", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError("give one target: --target-bpw, --target-size, --max-kl, or --fraction of the blocks.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"the target {field.name} is a number, got {value!r} ({type(value).__name__}).")
        value = getattr(self, given[0])
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise UsageError(
                f"--fraction is the part of the blocks at the higher level, 0 to 1; got {self.fraction!r}."
            )
        if not np.isfinite(value) or value < 0 or (value == 0 and self.fraction is None):
            raise UsageError(f"the target must be a number above zero, got {value!r}.")
        if self.bitops is not None and not 0 <= self.bitops <= 1:
            raise UsageError(f"--bitops is a fraction from 0 (the fewest) to 1 (the most), got {self.bitops!r}.")
        if self.bitops is not None and self.fraction is not None:
            raise UsageError(
                "--fraction says which blocks get more bits, so --bitops has nothing to choose: leave it out."
            )

    def check_score(self, name: str, unit: str) -> None:
        """Check that a score can serve this budget, before it is computed.

        Args:
            name: of the score.
            unit: what its values are in (`ptq.allocation.scores.Score`).

        Raises:
            UsageError: it cannot; says which can.
        """
        if unit != "order" and self.fraction is not None:
            raise UsageError("--fraction is for scores that rank blocks: lim, zd or random. Give a target instead.")
        if unit == "order" and self.bitops is not None:
            raise UsageError(
                f"--bitops needs a score of linears, and {name!r} only ranks blocks: take fisher, hawq or kl."
            )
        if unit != "nats" and self.max_kl is not None:
            what = "only ranks blocks" if unit == "order" else "is no KL, only in proportion to it"
            raise UsageError(f"--max-kl needs a score that predicts KL, and {name!r} {what}: take fisher, hawq or kl.")

    def describe(self) -> dict[str, float]:
        """Plain data: what was asked."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def parse_size(text: str) -> int:
    """Bytes from ``90MB``, ``1.5GiB`` or a number of bytes.

    Raises:
        UsageError: another form.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() or "b" if match else ""
    if match is None or unit not in _UNITS:
        raise UsageError(f"a size is a number with a unit, e.g. 90MB or 1.5GiB; got {text!r}.")
    return int(float(match[1]) * _UNITS[unit])


def fit_budget(table: Table, budget: Budget, kept_bytes: int, solver: str = "milp") -> Allocation:
    """The best choice within a budget.

    Args:
        table: scores and costs; infinite scores are formats that limits exclude.
        budget: the target.
        kept_bytes: what is stored besides the linears of the plan.
        solver: a name of `ptq.allocation.problem.solver.SOLVERS`.

    Raises:
        UsageError: the budget cannot be met, or everything fits; says what is feasible.
    """
    more = further_budgets(table, budget)
    if budget.max_kl is not None:
        return _within_loss(table, budget.max_kl, solver, more)
    costs = table.bits if budget.bpw is not None else table.stored
    return solve(Problem(table.scores, costs, budget_limit(table, budget, kept_bytes), more), solver)


def further_budgets(table: Table, budget: Budget) -> tuple[tuple[np.ndarray, float], ...]:
    """Costs and limits besides the target, as `ptq.allocation.problem.solver.Problem` takes them."""
    return () if budget.bitops is None else (_bit_operations(table, budget.bitops),)


def held_below(table: Table, budget: Budget, kept_bytes: int, held: Allocation) -> str | None:
    """A sentence where the limit of bit operations, and not the target, decides the size of a plan.

    Args:
        table: scores and costs.
        budget: the target.
        kept_bytes: what is stored besides the linears of the plan.
        held: the best choice within the budget.
    """
    if budget.bitops is None or (budget.bpw is None and budget.size is None):
        return None
    free = fit_budget(table, dataclasses.replace(budget, bitops=None), kept_bytes)
    if free.cost <= held.cost * (1 + 1e-9):
        return None
    if budget.bpw is not None:
        total = table.sizes.sum()
        sizes = f"{held.cost / total:.3f} bits per weight, where the target alone gives {free.cost / total:.3f}"
    else:
        sizes = f"{_megabytes(held.cost / 8 + kept_bytes)}, where the target alone gives "
        sizes += _megabytes(free.cost / 8 + kept_bytes)
    return f"--bitops {budget.bitops:g} holds the plan at {sizes}: allow more bit operations to spend the rest"


def budget_limit(table: Table, budget: Budget, kept_bytes: int) -> float:
    """A target as bits: real bits for one per weight, stored bits for one of the file.

    Raises:
        UsageError: the budget cannot be met, or everything fits; says what is feasible.
    """
    costs = table.bits if budget.bpw is not None else table.stored
    limit = budget.bpw * table.sizes.sum() if budget.bpw is not None else 8.0 * ((budget.size or 0) - kept_bytes)
    allowed = np.isfinite(table.scores)
    low, high = np.where(allowed, costs, np.inf).min(1).sum(), np.where(allowed, costs, 0).max(1).sum()
    if limit < low * (1 - 1e-9) or limit > high * (1 + 1e-9):
        raise UsageError(_infeasible(table, budget, float(low), float(high), kept_bytes, too_low=limit < low))
    return float(limit)


def _within_loss(table: Table, most: float, solver: str, more: tuple[tuple[np.ndarray, float], ...]) -> Allocation:
    """The cheapest choice with at most this predicted loss: the same problem with score and cost exchanged."""
    allowed = np.isfinite(table.scores)
    scores = np.where(allowed, table.scores, 0.0)
    least = np.where(allowed, table.scores, np.inf).min(1).sum()
    if least > most:
        raise UsageError(
            f"--max-kl {most:g} is below the least predicted KL of these candidates, {least:.4g} nats per token: allow "
            f"more, or add candidates with more bits."
        )
    found = solve(Problem(np.where(allowed, table.bits, np.inf), scores, most, more), solver)
    rows = np.arange(len(found.choice))
    score, cost = float(scores[rows, found.choice].sum()), float(table.bits[rows, found.choice].sum())
    return dataclasses.replace(found, score=score, cost=cost)


def _bit_operations(table: Table, fraction: float) -> tuple[np.ndarray, float]:
    """Bit operations per token (products x weight bits x activation bits), limited as in HAWQ-V3."""
    widths = [
        (c.bits, 16 if c.scheme is None or c.scheme.act_bits is None else c.scheme.act_bits) for c in table.candidates
    ]
    costs = table.sizes[:, None] * np.array([weight * act for weight, act in widths], dtype=float)
    costs = np.where(np.isfinite(table.scores), costs, 0.0)
    low = np.where(np.isfinite(table.scores), costs, np.inf).min(1).sum()
    return costs, float(low + fraction * (costs.max(1).sum() - low))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.4g} MB"


def _infeasible(table: Table, budget: Budget, low: float, high: float, kept: int, *, too_low: bool) -> str:
    labels = [candidate.label for candidate in table.candidates]
    side = "below the smallest" if too_low else "above the largest"
    if budget.bpw is not None:
        total = table.sizes.sum()
        asked = f"--target-bpw {budget.bpw:g}"
        feasible = f"{low / total:.3f} to {high / total:.3f} bits per weight"
    else:
        asked = f"--target-size {_megabytes(budget.size or 0)}"
        low, high = low / 8 + kept, high / 8 + kept
        feasible = f"{_megabytes(low)} to {_megabytes(high)} ({_megabytes(kept)} are kept in full precision)"
    advice = "allow more, or add smaller candidates" if too_low else "ask for less, or add larger candidates"
    return (
        f"{asked} is {side} that the candidates {', '.join(labels)} and the limits give: feasible are {feasible}, "
        f"scales and zero points included. {advice.capitalize()}."
    )

"""`Planner`: one model and its scores, from which plans for any budget are made."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.gradients import NewStore
from calib.model.experts import expert_lists
from calib.model.structure import find_blocks
from calib.precision import strict_float32
from calib.runner.activation_store import ActivationStore, settle_offload
from ptq.allocation.measure import measure_kl
from ptq.allocation.outside import allow_outside, outside_scores
from ptq.allocation.plan import Plan, linear_weights
from ptq.allocation.problem.budget import Budget, budget_limit, fit_budget, further_budgets, held_below
from ptq.allocation.problem.candidates import STAND_IN, Candidate, rounding_errors
from ptq.allocation.problem.groups import Limit, allowed_formats, group_linears
from ptq.allocation.problem.items import Item, Table, payload_bits
from ptq.allocation.problem.layerwise import two_levels
from ptq.allocation.problem.solver import Allocation, check_solver
from ptq.allocation.progress import Steps
from ptq.allocation.refine import Refiner
from ptq.allocation.scores import Context, ScoreValues
from ptq.allocation.scores.cache import ScoreCache
from ptq.allocation.setting import Setting
from ptq.errors import UsageError

__all__ = ["Planner"]

Say = Callable[[str], object]


class Planner:
    """Scores once, then plans for any budget.

    Args:
        setting: the model and what is chosen from.
        limits: conditions on the bits of linears.
        fused: linears that runtimes such as vLLM compute in one kernel share a format.
        cache: folder for scores; ``None`` keeps none.
        say: called with sentences for the log.
        steps: told what is being done, and after every step of it.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        limits: Sequence[Limit] = (),
        fused: bool = False,
        cache: Path | None = None,
        say: Say = lambda _: None,
        steps: Steps | None = None,
    ) -> None:
        self.setting, self._say, self._steps, self._cache = setting, say, steps or Steps(), cache
        self.items: tuple[Item, ...] = group_linears(setting.source, setting.linears, fused=fused)
        self._allowed = allow_outside(setting, self.items, allowed_formats(self.items, setting.candidates, limits))
        self._limits = limits
        self.values: ScoreValues | None = None
        self.notes: list[str] = []

    # -- scores ------------------------------------------------------------------------------------------------------

    def score(self) -> ScoreValues:
        """The scores, from the cache where they are there."""
        if self.values is not None:
            return self.values
        cache = None if self._cache is None else ScoreCache(self._cache, self._conditions())
        values = None if cache is None else cache.read()
        if values is not None:
            self._say(f"scores of an earlier run are used again ({cache.path if cache else ''})")
        else:
            with self._stores() as new_store, strict_float32():
                values = self.setting.score.compute(self._context(new_store))
                values = dataclasses.replace(
                    values, table={**values.table, **outside_scores(self.setting, new_store, self._steps)}
                )
            problem = cache.write(values) if cache is not None else None
            if problem is not None:
                self._say(problem)
        table, notes = _repaired(values.table)
        self.notes += [*values.notes, *notes]
        self.values = dataclasses.replace(values, table=table)
        return self.values

    def _context(self, new_store: NewStore) -> Context:
        s = self.setting
        return Context(
            s.source,
            tuple(one.name for one in s.linears if one.name not in s.outside),
            s.candidates,
            None if s.calibration is None else s.calibration.tokens,
            s.device,
            s.dtype,
            s.seed,
            lambda weight: rounding_errors(weight, s.candidates),
            new_store,
            self._steps,
            s.probes,
        )

    def _conditions(self) -> dict[str, Any]:
        s = self.setting
        return {
            "model": s.source.fingerprint(),
            **({"outside": list(s.outside)} if s.outside else {}),
            "score": s.score.name,
            "candidates": [None if c.scheme is None else c.scheme.to_dict() for c in s.candidates],
            "errors": STAND_IN,
            "tokens": None if s.calibration is None else s.calibration.fingerprint,
            "linears": [one.name for one in s.linears],
            "dtype": str(s.dtype),
            "seed": s.seed,
            "probes": s.probes,
        }

    @contextlib.contextmanager
    def _stores(self) -> Iterator[NewStore]:
        """Makes stores of hidden states: on the device where all blocks' fit, else in memory or on disk."""
        s = self.setting
        tokens = s.held_out if s.calibration is None else s.calibration.tokens
        width = int(s.source.skeleton.config.get_text_config().hidden_size)
        blocks = len(find_blocks(s.source.skeleton)) + 2
        size = 0 if tokens is None else blocks * tokens.numel() * width * s.dtype.itemsize
        target = settle_offload("auto", size, s.device)
        with tempfile.TemporaryDirectory(prefix="ptq-plan-") as folder:
            yield lambda name: ActivationStore(s.device, target, Path(folder) / name)

    # -- plans -------------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """Scores and costs of all items; infinite scores where limits exclude a format."""
        values = self.score()
        zeros = [0.0] * len(self.setting.candidates)
        scores = values.table or {one.name: zeros for one in self.setting.linears}
        table = Table.make(self.items, self.setting.candidates, scores)
        return table.with_scores(np.where(self._allowed, table.scores, np.inf))

    def allocate(self, budget: Budget, solver: str = "milp") -> Allocation:
        """The best choice within a budget.

        Raises:
            UsageError: the budget cannot be met; says what is feasible.
        """
        budget.check_score(self.setting.score.name, self.setting.score.unit)
        if self.setting.score.unit != "order":
            return fit_budget(self.table, budget, self.setting.kept_bytes, solver)
        blocks = find_blocks(self.setting.source.skeleton)
        table = self.table
        if budget.size is not None:
            table = dataclasses.replace(table, bits=table.stored)
        limit = None if budget.fraction is not None else budget_limit(table, budget, self.setting.kept_bytes)
        return two_levels(table, self.score().blocks, blocks, limit, budget.fraction)

    def check_budget(self, budget: Budget, solver: str = "milp", rounds: int = 0) -> None:
        """Check before anything is scored, which takes minutes, what only depends on sizes and names.

        Raises:
            UsageError: the budget cannot be met with these candidates and limits or by this score, refinement has
                nothing to measure with, or an unknown solver.
        """
        budget.check_score(self.setting.score.name, self.setting.score.unit)
        self._check_rounds(budget, rounds)
        check_solver(solver, more_budgets=budget.bitops is not None)
        if budget.bpw is None and budget.size is None:
            return
        zeros = {one.name: [0.0] * len(self.setting.candidates) for one in self.setting.linears}
        table = Table.make(self.items, self.setting.candidates, zeros)
        budget_limit(table.with_scores(np.where(self._allowed, 0.0, np.inf)), budget, self.setting.kept_bytes)

    def planned(
        self, budget: Budget, solver: str = "milp", *, check: bool = True, rounds: int = 0
    ) -> tuple[Plan, Allocation]:
        """A plan and its allocation.

        Args:
            budget: the target.
            solver: a name of `ptq.allocation.problem.solver.SOLVERS`.
            check: measure the plan's KL on held-out tokens, where there are any.
            rounds: of refinement, at most.

        Raises:
            UsageError: the budget cannot be met, or refinement has nothing to measure with.
        """
        self.check_budget(budget, solver, rounds)
        allocation = self.allocate(budget, solver)
        held = held_below(self.table, budget, self.setting.kept_bytes, allocation)
        if held is not None:
            self.notes.append(held)
        if rounds:
            allocation = self._refined(allocation, budget, rounds)
        found = self.plan(allocation, budget.describe())
        if check and self.setting.held_out is not None:
            found = dataclasses.replace(found, about={**found.about, **self.measured(allocation)})
        return found, allocation

    def _check_rounds(self, budget: Budget, rounds: int) -> None:
        s = self.setting
        if rounds < 0:
            raise UsageError(f"--refine is a number of rounds, 0 or more; got {rounds!r}.")
        if rounds == 0:
            return
        if s.score.unit != "nats" or s.calibration is None or s.held_out is None:
            raise UsageError("--refine needs a score in nats (fisher, out-fisher, hawq, kl) and its calibration text.")
        if s.outside:
            raise UsageError("--refine measures linears of blocks: leave out --include, or --refine.")
        if budget.bpw is None and budget.size is None:
            raise UsageError("--refine moves bits within a budget: give --target-bpw or --target-size.")

    def _refined(self, allocation: Allocation, budget: Budget, rounds: int) -> Allocation:
        s = self.setting
        assert s.calibration is not None
        with self._stores() as new_store, strict_float32():
            tokens = s.calibration.tokens
            refiner = Refiner(self.items, s, tokens, new_store, self._steps)
            limit = budget_limit(self.table, budget, s.kept_bytes)
            table = self.table if budget.bpw is not None else dataclasses.replace(self.table, bits=self.table.stored)
            allocation, notes = refiner.refine(
                table, allocation, limit, rounds, self.measure, further_budgets(table, budget)
            )
        self.notes += notes
        for note in notes:
            self._say(note)
        return allocation

    def plan(self, allocation: Allocation, asked: Mapping[str, Any]) -> Plan:
        """An allocation as a plan.

        Args:
            allocation: of the items.
            asked: what it was made for, plain data.
        """
        s, table = self.setting, self.table
        rows = np.arange(len(self.items))
        chosen = allocation.choice
        bits = float(table.bits[rows, chosen].sum())
        used = [column for column in range(len(s.candidates)) if (chosen == column).any()]
        about: dict[str, Any] = {
            "model": s.source.name,
            "fingerprint": s.source.fingerprint(),
            "weights": linear_weights(s.source.skeleton),
            "score": s.score.name,
            "target": dict(asked),
            "solver": allocation.solver,
            "bits_per_weight": round(bits / float(table.sizes.sum()), 6),
            "file_bytes": int(float(table.stored[rows, chosen].sum()) / 8) + s.kept_bytes,
            "candidates": [candidate.label for candidate in s.candidates],
            "errors": f"of {STAND_IN} with searched scales, which stands for the method",
        }
        if s.score.unit == "nats":
            about["predicted_kl"] = float(f"{allocation.score:.6g}")
        if s.outside:
            about["include"] = list(s.outside)
        if self._limits:
            about["limits"] = [str(limit) for limit in self._limits]
        if s.calibration is not None:
            about["tokens"] = {k: s.calibration.describe()[k] for k in ("source", "seed", "sequences", "seqlen")}
        if self.notes:
            about["notes"] = list(dict.fromkeys(self.notes))
        formats = {s.candidates[column].label: s.candidates[column].scheme for column in used}
        return Plan(formats, self._labels(chosen), about)

    def _labels(self, chosen: NDArray[np.int64]) -> dict[str, str]:
        """Labels by name of a linear, in the model's order; experts of a block, which share one, by a pattern."""
        owner = {one.name: row for row, item in enumerate(self.items) for one in item.linears}
        experts = tuple(f"{name}." for name in expert_lists(self.setting.source.skeleton))
        labels: dict[str, str] = {}
        for linear in self.setting.linears:
            candidate = self.setting.candidates[int(chosen[owner[linear.name]])]
            if linear.name in self.setting.outside and candidate.scheme is None:
                continue  # it stays as it is, as where nobody names it
            inside = next((prefix for prefix in experts if linear.name.startswith(prefix)), None)
            key = linear.name if inside is None else f"{inside}*"
            labels[key] = candidate.label
        return labels

    def curve(self, points: int = 25, solver: str = "milp") -> list[dict[str, float]]:
        """The best allocations from the smallest to the largest budget: real bits, file bytes and predicted KL."""
        if self.setting.score.unit == "order":
            raise UsageError(
                f"the curve needs a score that predicts a loss, and {self.setting.score.name!r} only ranks blocks: "
                f"take fisher, hawq or kl."
            )
        table, rows = self.table, np.arange(len(self.items))
        total = float(table.sizes.sum())
        allowed = np.isfinite(table.scores)
        low = float(np.where(allowed, table.bits, np.inf).min(1).sum())
        high = float(np.where(allowed, table.bits, 0).max(1).sum())
        found = []
        for budget in np.linspace(low, high, points):
            allocation = self.allocate(Budget(bpw=float(budget) / total), solver)
            stored = float(table.stored[rows, allocation.choice].sum()) / 8 + self.setting.kept_bytes
            bits = float(table.bits[rows, allocation.choice].sum()) / total
            found.append({"bits_per_weight": bits, "file_bytes": stored, "predicted_kl": allocation.score})
        return found

    def uniform(self) -> list[dict[str, Any]]:
        """The same of every candidate for all linears, limits aside, with its label."""
        values = self.score().table
        table = Table.make(self.items, self.setting.candidates, values)
        total = float(table.sizes.sum())
        return [
            {
                "label": candidate.label,
                "bits_per_weight": float(table.bits[:, column].sum()) / total,
                "file_bytes": float(table.stored[:, column].sum()) / 8 + self.setting.kept_bytes,
                "predicted_kl": float(table.scores[:, column].sum()),
            }
            for column, candidate in enumerate(self.setting.candidates)
        ]

    def layers(self, allocation: Allocation) -> list[dict[str, Any]]:
        """Every linear with its format and real bits per weight, for tables and pictures."""
        chosen = self.candidates_of(allocation)
        return [
            {
                "name": one.name,
                "format": chosen[one.name].label,
                "bits_per_weight": payload_bits(one, chosen[one.name].scheme) / one.size,
            }
            for one in self.setting.linears
        ]

    def candidates_of(self, allocation: Allocation) -> dict[str, Candidate]:
        """By full name of a linear, its format."""
        return {
            one.name: self.setting.candidates[int(column)]
            for item, column in zip(self.items, allocation.choice, strict=True)
            for one in item.linears
        }

    # -- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, allocation: Allocation) -> NDArray[np.float64]:
        """KL per held-out token ``[sequences, tokens]`` of an allocation, rounded by the stand-in method."""
        s = self.setting
        if s.held_out is None:
            raise UsageError("measuring needs tokens, and this plan reads none: give calibration text (--calib).")
        with self._stores() as new_store, strict_float32():
            return measure_kl(
                s.source,
                s.held_out,
                self.candidates_of(allocation),
                device=s.device,
                dtype=s.dtype,
                new_store=new_store,
                steps=self._steps,
            )

    def measured(self, allocation: Allocation) -> dict[str, Any]:
        """The KL of an allocation on held-out tokens, as plain data for a plan."""
        kl = self.measure(allocation)
        error = kl.mean(1).std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
        shown: dict[str, Any] = {"measured_kl": float(f"{kl.mean():.6g}"), "held_out_tokens": int(kl.size)}
        return shown | ({} if np.isnan(error) else {"measured_kl_se": float(f"{error:.3g}")})


def _repaired(table: Mapping[str, Sequence[float]]) -> tuple[dict[str, list[float]], list[str]]:
    """Scores that are not finite become the worst of their column, negative ones zero; sentences that say so."""
    if not table:
        return {}, []
    names, values = list(table), np.array([list(row) for row in table.values()], dtype=np.float64)
    notes = []
    bad = ~np.isfinite(values)
    if bad.all(0).any():
        raise UsageError(
            "a format's scores are not finite for any linear: try --dtype float32, or leave the format out."
        )
    if bad.any():
        worst = np.where(bad, -np.inf, values).max(0)
        values = np.where(bad, worst, values)
        first = names[int(np.flatnonzero(bad.any(1))[0])]
        notes.append(f"{_count(bad)} had scores that are not finite, taken as the worst, e.g. {first}")
    below = values < 0
    if below.any():
        first = names[int(np.flatnonzero(below.any(1))[0])]
        notes.append(f"{_count(below)} had negative scores, taken as zero, e.g. {first}: more tokens or probes help")
        values = np.maximum(values, 0.0)
    return {name: [float(value) for value in row] for name, row in zip(names, values, strict=True)}, notes


def _count(rows: NDArray[np.bool_]) -> str:
    number = int(rows.any(1).sum())
    return "1 linear" if number == 1 else f"{number} linears"

"""Paired results -> samples: for each measure one number per item and a record, ready to be subtracted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from calib.errors import DataError
from evals.comparison.alignment import Target
from evals.items import Column
from evals.record import TaskResult, TextResult
from evals.statistics import Floats
from evals.tasks.metrics import HIGHER_IS_BETTER, answers, per_item

__all__ = ["Sample", "samples_of"]

_ACCURACIES = ("acc", "acc_norm", "acc_bytes")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One measure of one target, item by item.

    Args:
        target: as in `evals.comparison.types.Difference`.
        measure: as in `evals.comparison.types.Difference`.
        headline: as in `evals.comparison.types.Difference`.
        higher_is_better: as in `evals.comparison.types.Difference`.
        sums: for each record ``[n]``, or ``None`` where it has not measured this.
        counts: ``[n]``, what ``sums`` are divided by.
        clusters: ``[n]`` group of each item, where items are not independent draws.
        against: for each record what it was measured against; only equal ones can be subtracted.
        answers: for accuracies, for each record the answer given, ``[n]``; otherwise ``None``.
    """

    target: str
    measure: str
    headline: bool
    higher_is_better: bool
    sums: tuple[Floats | None, ...]
    counts: Floats
    clusters: Column | None = None
    against: tuple[str, ...] = ()
    answers: tuple[Column, ...] | None = None

    def mean_of(self, places: Sequence[int]) -> Floats | None:
        """Mean over records of their sums, ``[n]``; ``None`` if one of them has none, or they do not fit together."""
        found = [sums for place in places if (sums := self.sums[place]) is not None]
        if len(found) < len(places) or (self.against and len({self.against[place] for place in places}) > 1):
            return None
        return np.asarray(np.mean(found, axis=0), dtype=np.float64)


def samples_of(target: Target) -> list[Sample]:
    """All measures of a text or task, the headline first.

    Raises:
        DataError: a number that is not finite.
    """
    texts = [result for result in target.results if isinstance(result, TextResult)]
    tasks = [result for result in target.results if isinstance(result, TaskResult)]
    found = _of_texts(target, texts) if texts else _of_tasks(target, tasks)
    for sample in found:
        _require_finite(sample)
    return found


def _of_texts(target: Target, results: Sequence[TextResult]) -> list[Sample]:
    name, tokens = target.name, _column(target, results, 0, "tokens")
    if tokens is None:
        raise DataError(f"{name} has no column of tokens; the record is damaged. Evaluate again.")
    nll = tuple(_column(target, results, place, "nll") for place in range(len(results)))
    clusters = None if results[0].clusters is None else results[0].clusters[target.rows[0]]
    found = [Sample(name, "ln ppl", True, False, nll, tokens, clusters)]
    against = tuple("" if r.divergence is None else f"{r.divergence.base} {r.divergence.top_k}" for r in results)
    for measure, column, headline, higher in (("kl", "kl", True, False), ("top1", "same_top", False, True)):
        sums = tuple(_column(target, results, place, column) for place in range(len(results)))
        if any(values is not None for values in sums):
            found.append(Sample(name, measure, headline, higher, sums, tokens, clusters, against=against))
    sizes = _column(target, results, 0, "bytes")
    if results[0].convention == "documents" and sizes is not None and sizes.sum() > 0:
        bits = tuple(None if values is None else values / math.log(2) for values in nll)
        found.append(Sample(name, "bits per byte", False, False, bits, sizes))
    return found


def _of_tasks(target: Target, results: Sequence[TaskResult]) -> list[Sample]:
    first = results[0]
    single = "greedy" in first.items.columns
    others = [name for name in HIGHER_IS_BETTER if name != first.metric and not (single and name in _ACCURACIES[1:])]
    clusters = None if first.clusters is None else first.clusters[target.rows[0]]
    counts = np.ones(len(target.rows[0]))
    found = []
    for metric in (first.metric, *others):
        sums = tuple(_scores(result, metric, rows) for result, rows in zip(results, target.rows, strict=True))
        given = None
        if metric in _ACCURACIES:
            given = tuple(answers(r.items, metric)[rows] for r, rows in zip(results, target.rows, strict=True))
        better = HIGHER_IS_BETTER[metric]
        found.append(Sample(target.name, metric, metric == first.metric, better, sums, counts, clusters, answers=given))
    return found


def _scores(result: TaskResult, metric: str, rows: Column) -> Floats:
    return np.asarray(per_item(result.items, metric)[rows], dtype=np.float64)


def _column(target: Target, results: Sequence[TextResult], place: int, name: str) -> Floats | None:
    values = results[place].items.columns.get(name)
    return None if values is None else values[target.rows[place]].astype(np.float64)


def _require_finite(sample: Sample) -> None:
    for place, values in enumerate(sample.sums):
        if values is not None and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"{sample.target}: {sample.measure} of item {row} of record {place + 1} is {values[row]}; the record "
                "is damaged. Evaluate again."
            )

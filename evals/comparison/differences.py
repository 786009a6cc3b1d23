"""Samples of candidates -> their figures and differences, with the errors of items and of seeds apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from evals.comparison.grouping import Group
from evals.comparison.intervals import accuracy_inference, freedom_of_sum, paired_inference, t_inference
from evals.comparison.samples import Sample
from evals.comparison.types import Difference, Flips, Score
from evals.statistics import Floats, by_cluster, mean_and_error, minimum_detectable, minimum_detectable_flips

__all__ = ["AVERAGE", "Settings", "average_difference", "average_score", "difference", "score"]

AVERAGE = "average of tasks"


@dataclasses.dataclass(frozen=True)
class Settings:
    """``confidence`` of intervals; ``draws`` and ``seed`` of the bootstrap."""

    confidence: float
    draws: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Seeds:
    """What calibration seeds add to the variance of a difference.

    Args:
        spread: standard deviation of the difference of one seed; ``None`` without several seeds.
        variances: of each side's mean, for the sides that have several seeds.
        freedoms: degrees of freedom of each.
    """

    spread: float | None
    variances: tuple[float, ...]
    freedoms: tuple[float, ...]


def score(sample: Sample, group: Group) -> Score | None:
    """A candidate's own figure, or ``None`` if a record has not measured it."""
    sums = sample.mean_of(group.places)
    if sums is None:
        return None
    value, error = mean_and_error(sums, sample.counts, clusters=sample.clusters)
    spread = _spread(_values(sample, group))
    return Score(group.label, sample.target, sample.measure, value, error, spread, sample.headline)


def average_score(samples: Sequence[Sample], group: Group) -> Score | None:
    """The mean of the tasks' headline figures, each task with the same weight."""
    found = [score(sample, group) for sample in samples]
    parts = [part for part in found if part is not None]
    value = sum(part.value for part in parts) / len(parts)
    error = _average_error([part.standard_error for part in parts])
    spread = _spread(_averages(samples, group))
    return Score(group.label, AVERAGE, "accuracy", value, error, spread, True)


def difference(sample: Sample, reference: Group, candidate: Group, settings: Settings) -> Difference | None:
    """``candidate - reference`` on the same items, not yet adjusted; ``None`` if one of them has no such measure."""
    sums = sample.mean_of((*reference.places, *candidate.places))
    before, after = sample.mean_of(reference.places), sample.mean_of(candidate.places)
    if sums is None or before is None or after is None:
        return None
    change = after - before
    mean, within = mean_and_error(change, sample.counts, clusters=sample.clusters)
    blocks = len(by_cluster(change, None, sample.clusters)[0])
    seeds = _seeds(_values(sample, reference), _values(sample, candidate))
    error, freedom = _total(within, blocks - 1, seeds)
    flips = _flips(sample, reference, candidate)
    if seeds.spread is not None:
        found = t_inference(mean, error, freedom, settings.confidence)
    elif flips is not None and sample.clusters is None:
        found = accuracy_inference(round(flips.lost), round(flips.won), len(change), settings.confidence)
    else:
        found = paired_inference(
            change,
            sample.counts,
            clusters=sample.clusters,
            confidence=settings.confidence,
            draws=settings.draws,
            seed=settings.seed,
        )
    detectable = minimum_detectable(error, freedom) if error else None
    if flips is not None and seeds.spread is None and sample.clusters is None:
        detectable = minimum_detectable_flips(flips.rate, len(change))
    return Difference(
        reference=reference.label,
        candidate=candidate.label,
        target=sample.target,
        measure=sample.measure,
        headline=sample.headline,
        difference=mean,
        standard_error=error,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        p_adjusted=None,
        items=len(change),
        blocks=blocks,
        within_seed=within,
        between_seeds=seeds.spread,
        seeds=len(candidate.places),
        flips=flips,
        detectable=detectable,
        higher_is_better=sample.higher_is_better,
        conclusion="not significant",
    )


def average_difference(
    samples: Sequence[Sample], parts: Sequence[Difference], reference: Group, candidate: Group, settings: Settings
) -> Difference:
    """The mean of the tasks' headline differences; tasks are independent samples of items, seeds are shared by them.

    Args:
        samples: headline of each task, two or more.
        parts: the differences of these samples between ``reference`` and ``candidate``.
        reference: as in `difference`.
        candidate: as in `difference`.
        settings: only the confidence is used.
    """
    mean = sum(part.difference for part in parts) / len(parts)
    within = _average_error([part.within_seed for part in parts])
    variances = [(part.within_seed or 0.0) ** 2 for part in parts]
    freedom = freedom_of_sum(variances, [max(part.blocks - 1, 1) for part in parts])
    seeds = _seeds(_averages(samples, reference), _averages(samples, candidate))
    error, freedom = _total(within, freedom, seeds)
    found = t_inference(mean, error, freedom, settings.confidence)
    return dataclasses.replace(
        parts[0],
        target=AVERAGE,
        measure="accuracy",
        difference=mean,
        standard_error=error,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        items=sum(part.items for part in parts),
        blocks=sum(part.blocks for part in parts),
        within_seed=within,
        between_seeds=seeds.spread,
        flips=None,
        detectable=minimum_detectable(error, freedom) if error else None,
    )


def _values(sample: Sample, group: Group) -> list[float]:
    """The figure of each record of a candidate."""
    total = float(sample.counts.sum())
    return [float(sums.sum()) / total for place in group.places if (sums := sample.sums[place]) is not None]


def _averages(samples: Sequence[Sample], group: Group) -> list[float]:
    """The mean over tasks of each record: spreads of tasks that move together with the seed do not cancel."""
    return [float(value) for value in np.mean([_values(sample, group) for sample in samples], axis=0)]


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _seeds(reference: Sequence[float], candidate: Sequence[float]) -> _Seeds:
    several = [values for values in (reference, candidate) if len(values) > 1]
    if not several:
        return _Seeds(None, (), ())
    spreads = [float(np.var(values, ddof=1)) for values in several]
    variances = tuple(spread / len(values) for spread, values in zip(spreads, several, strict=True))
    return _Seeds(math.sqrt(sum(spreads)), variances, tuple(len(values) - 1.0 for values in several))


def _total(within: float | None, freedom: float, seeds: _Seeds) -> tuple[float | None, float]:
    """Error of items and seeds together, and its degrees of freedom."""
    if within is None:
        return None, 0.0
    variances, freedoms = [within**2, *seeds.variances], [freedom, *seeds.freedoms]
    if not seeds.variances:
        return within, freedom
    return math.sqrt(sum(variances)), freedom_of_sum(variances, freedoms)


def _average_error(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None


def _flips(sample: Sample, reference: Group, candidate: Group) -> Flips | None:
    """Counts of every pair of records, averaged; ``None`` for a measure without right and wrong."""
    if sample.answers is None:
        return None
    rows = []
    for i in reference.places:
        for j in candidate.places:
            before, after = _right(sample, i), _right(sample, j)
            other = sample.answers[i] != sample.answers[j]
            rows.append((int((before & ~after).sum()), int((~before & after).sum()), float(other.mean())))
    lost, won, changed = (float(value) for value in np.mean(rows, axis=0))
    return Flips(lost, won, (lost + won) / len(sample.counts), changed)


def _right(sample: Sample, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    sums: Floats | None = sample.sums[place]
    assert sums is not None  # accuracies are in every record
    return sums > 0.5

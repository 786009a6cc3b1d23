"""Compare several records item by item: every candidate against the reference and against every other candidate.

The way is short. `pooling` makes candidates of records, `pairing` finds the items that all of them measured,
`samples` makes one number per item of them, `differences` subtracts and adds errors, Holm's correction
is over all headline differences at once, and `conclusions` puts the result into words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from calib.errors import UsageError
from evals.comparison.alignment import Target, pair
from evals.comparison.conclusions import notes_on, sentences_on
from evals.comparison.differences import Settings, average_difference, average_score, difference, score
from evals.comparison.grouping import Group, pool
from evals.comparison.samples import Sample, samples_of
from evals.comparison.types import Comparison, Difference, Score
from evals.record import Record, TaskResult
from evals.statistics import holm

__all__ = ["compare"]


def compare(
    records: Sequence[Record],
    *,
    labels: Sequence[str] | None = None,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    shared: bool = False,
) -> Comparison:
    """Compare evaluations of two or more models on the same items.

    Args:
        records: the reference first. Records of one recipe that differ in the calibration seed are pooled. A single
            record that was measured against a base is compared with that base.
        labels: one per record; records of one label are pooled.
        confidence: of the intervals; a difference is significant if its adjusted p is below ``1 - confidence``.
        draws: samples of the bootstrap.
        seed: of the bootstrap.
        shared: compare the items that all records have, instead of refusing records of different items.

    Raises:
        UsageError: fewer than two candidates, a confidence outside 0.5 .. 0.9999, fewer than 100 draws, wrong labels.
        DataError: records of different items, nothing in common, a damaged record.
    """
    _check(confidence, draws)
    all_records = _with_base(records, labels)
    groups = pool(all_records, labels)
    if len(groups) < 2:
        raise UsageError(_too_few(all_records, groups))
    targets, left_out = pair(all_records, shared=shared)
    samples = {target.name: samples_of(target) for target in targets}
    tasks = [samples[target.name][0] for target in targets if isinstance(target.results[0], TaskResult)]
    flat = [sample for found in samples.values() for sample in found]
    settings = Settings(confidence, draws, seed)
    found = [
        one
        for reference, candidate in itertools.combinations(groups, 2)
        for one in _differences(flat, tasks, reference, candidate, settings)
    ]
    differences = _with_conclusions(found, confidence)
    notes = (*notes_on(all_records, groups, differences, confidence), *left_out, *_notes_of(targets))
    return Comparison(
        candidates=tuple(group.candidate for group in groups),
        scores=tuple(_scores(flat, tasks, groups)),
        differences=differences,
        sentences=tuple(sentences_on(differences, confidence)),
        notes=tuple(dict.fromkeys(notes)),
        confidence=confidence,
    )


def _check(confidence: float, draws: int) -> None:
    if not 0.5 <= confidence <= 0.9999:
        raise UsageError(f"the confidence must be in 0.5 .. 0.9999, got {confidence}; 0.95 is usual.")
    if draws < 100:
        raise UsageError(f"a bootstrap of {draws} draws says nothing; use 100 or more, 10,000 is usual.")


def _with_base(records: Sequence[Record], labels: Sequence[str] | None) -> list[Record]:
    if len(records) == 1 and records[0].base is not None and (labels is None or len(labels) == 2):
        return [records[0].base, records[0]]
    return list(records)


def _too_few(records: Sequence[Record], groups: Sequence[Group]) -> str:
    if not groups:
        return "no records to compare; give the reference and one or more others."
    if len(records) == 1:
        return (
            f"one record only ({records[0].model.source}), without a base in it; give two or more, the reference first."
        )
    return (
        f"all records are calibration seeds of one recipe ({groups[0].label}) and are pooled: there is "
        "nothing to compare them with. Add the record of another model, or tell them apart with labels."
    )


def _differences(
    samples: Sequence[Sample], tasks: Sequence[Sample], reference: Group, candidate: Group, settings: Settings
) -> list[Difference]:
    """In the order of `samples`, the average of tasks at the end."""
    found = [one for sample in samples if (one := difference(sample, reference, candidate, settings)) is not None]
    names = {(task.target, task.measure) for task in tasks}
    parts = [one for one in found if (one.target, one.measure) in names]
    if len(parts) > 1:
        found.append(average_difference(tasks, parts, reference, candidate, settings))
    return found


def _scores(samples: Sequence[Sample], tasks: Sequence[Sample], groups: Sequence[Group]) -> list[Score]:
    found = [score(sample, group) for sample in samples for group in groups]
    if len(tasks) > 1:
        found += [average_score(tasks, group) for group in groups]
    return [one for one in found if one is not None]


def _with_conclusions(found: Sequence[Difference], confidence: float) -> tuple[Difference, ...]:
    """Holm over the headline differences that have a p value; the others get no conclusion."""
    family = [place for place, one in enumerate(found) if one.headline and one.p_value is not None]
    adjusted = dict(zip(family, holm([found[place].p_value or 0.0 for place in family]), strict=True))
    return tuple(_judged(one, adjusted.get(place), confidence) for place, one in enumerate(found))


def _judged(one: Difference, adjusted: float | None, confidence: float) -> Difference:
    if adjusted is None or adjusted >= 1 - confidence or one.difference == 0:
        return dataclasses.replace(one, p_adjusted=adjusted)
    improved = (one.difference > 0) == one.higher_is_better
    return dataclasses.replace(one, p_adjusted=adjusted, conclusion="better" if improved else "worse")


def _notes_of(targets: Sequence[Target]) -> list[str]:
    """What the results themselves want a reader to know."""
    return [f"{target.name}: {note}" for target in targets for result in target.results for note in result.notes]

"""What `evals.compare` finds: candidates, paired differences with significance. Plain data, no arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Candidate", "Comparison", "Difference", "Flips", "Score"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One recipe: a record, or the records of its calibration seeds.

    Args:
        label: short and unique in the comparison, e.g. ``"coreq int3 sym g128"``.
        sources: the models' paths or names.
        seeds: calibration seed of each; ``None`` where a record names none.
        bytes: of the weights, the mean over the records.
        bits_per_weight: of the quantized linears; ``None`` for a full-precision model.
    """

    label: str
    sources: tuple[str, ...]
    seeds: tuple[int | None, ...]
    bytes: float
    bits_per_weight: float | None


@dataclasses.dataclass(frozen=True)
class Flips:
    """Items whose answer changed; counts of one record, means over several.

    Args:
        lost: right in the reference, wrong in the candidate (``b``).
        won: wrong in the reference, right in the candidate (``c``).
        rate: ``(lost + won) / items``.
        answers_changed: share of items with another answer, right or wrong.
    """

    lost: float
    won: float
    rate: float
    answers_changed: float


@dataclasses.dataclass(frozen=True)
class Score:
    """One candidate's own figure.

    Args:
        candidate: its label.
        target: name of the text or task, or ``"average of tasks"``.
        measure: ``ln ppl``, ``kl``, ``top1``, ``acc``, ``acc_norm``, ``p_gold``, ``ll_gold`` ...
        value: mean over the candidate's records.
        standard_error: of sampling items, within a record; ``None`` if unknown.
        between_seeds: standard deviation over calibration seeds; ``None`` for one.
        headline: whether tables show it without being asked (the text's ``ln ppl`` and ``kl``, the task's metric).
    """

    candidate: str
    target: str
    measure: str
    value: float
    standard_error: float | None
    between_seeds: float | None
    headline: bool


@dataclasses.dataclass(frozen=True)
class Difference:
    """``candidate - reference`` on the same items.

    Args:
        reference: label of the reference.
        candidate: label of the candidate.
        target: as in `Score`.
        measure: as in `Score`.
        headline: as in `Score`.
        difference: mean of the paired differences, over items and then over seeds.
        standard_error: of `difference`, from items within seeds and from seeds where there are several.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
        p_value: of no difference: exact McNemar for accuracies of one record per side, otherwise from the studentised
            bootstrap or Student's t (`evals.comparison.intervals`).
        p_adjusted: Holm's, over the headline differences of the comparison; ``None`` for others.
        items: paired items.
        blocks: independent draws among them (segments, documents, clusters).
        within_seed: standard error of one seed's difference, from its items.
        between_seeds: standard deviation of the seeds' differences; ``None`` for one.
        seeds: number of records.
        flips: for accuracies.
        detectable: the smallest true difference that such a sample finds four times in five (two-sided, 5 %).
        higher_is_better: direction of the measure.
        conclusion: ``better``, ``worse`` or ``not significant``.
    """

    reference: str
    candidate: str
    target: str
    measure: str
    headline: bool
    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    items: int
    blocks: int
    within_seed: float | None
    between_seeds: float | None
    seeds: int
    flips: Flips | None
    detectable: float | None
    higher_is_better: bool
    conclusion: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Candidates, the first of which is the reference, and how they differ.

    Args:
        candidates: in the order given.
        scores: every candidate's figures.
        differences: every candidate against the reference, then every other pair.
        sentences: what is and what is not significant, in words.
        notes: what a reader must know (one seed only, other dtype, other device).
        confidence: of the intervals, e.g. 0.95.
    """

    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {"compare": "ptq-compare", "version": 2} | dataclasses.asdict(self)

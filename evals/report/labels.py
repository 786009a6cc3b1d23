"""Short, unique names of records, for tables and pictures, and how each name looks in all pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evals.comparison.grouping import pool
from evals.comparison.types import Comparison
from evals.record import Record
from evals.report.theme import MARKERS, SERIES

__all__ = ["label_records", "looks", "series_of", "with_bases"]


def with_bases(records: Sequence[Record]) -> list[Record]:
    """The records, and before them every base inside one that is not among them."""
    known = {record.model.fingerprint for record in records}
    bases: dict[str, Record] = {}
    for record in records:
        base = record.base
        if base is not None and base.model.fingerprint not in known:
            bases.setdefault(base.model.fingerprint, base)
    return [*bases.values(), *records]


def label_records(records: Sequence[Record], comparison: Comparison | None = None) -> list[str]:
    """One label per record: its candidate's, in the comparison or as `pooling.pool` would call it.

    Seeds of one candidate are told apart by their seed, and what is the same even then by its place.
    """
    labels = [""] * len(records)
    for group in pool(records):
        for place in group.places:
            labels[place] = group.label
    candidates = comparison.candidates if comparison else ()
    names = {source: candidate.label for candidate in candidates for source in candidate.sources}
    labels = [names.get(record.model.source, label) for record, label in zip(records, labels, strict=True)]
    seeds = [(record.model.calibration or {}).get("seed") for record in records]
    labels = [
        label if labels.count(label) == 1 or seed is None else f"{label}, seed {seed}"
        for label, seed in zip(labels, seeds, strict=True)
    ]
    return [f"{label} #{i + 1}" if labels.index(label) < i else label for i, label in enumerate(labels)]


def series_of(label: str) -> str:
    """What points of one method have in common: the label up to the first number."""
    return re.split(r"[\s,]+\d", label, maxsplit=1)[0]


def looks(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour (a name of the palette) and marker of each label: methods differ in colour, all in the marker.

    Args:
        labels: of the candidates, the reference first; it is drawn in ink.
    """
    series = list(dict.fromkeys(series_of(label) for label in labels[1:]))
    found = {labels[0]: ("ink", "D")} if labels else {}
    for place, label in enumerate(labels[1:]):
        found[label] = (f"series{series.index(series_of(label)) % SERIES}", MARKERS[place % len(MARKERS)])
    return found

"""Results of several records on one text or task -> the rows that all of them measured, in one order.

The hashes of the items decide, and nothing else: two items with one hash are the same tokens scored from the same
place, or the same question with the same answers. An item that occurs twice is paired by its occurrences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import DataError
from evals.record import Record, TaskResult, TextResult

__all__ = ["Result", "Target", "pair"]

Result = TextResult | TaskResult
Rows = NDArray[np.int64]
Key = tuple[int, int]  # hash, and how many items of this hash came before


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A text or a task that all records have.

    Args:
        name: unique in the comparison.
        results: one per record.
        rows: for each result the rows of its items, int64 ``[n]``; row ``i`` of all is the same item.
    """

    name: str
    results: tuple[Result, ...]
    rows: tuple[Rows, ...]


def pair(records: Sequence[Record], *, shared: bool = False) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Texts and tasks of the first record that all the others have, and notes on what is left out.

    Args:
        records: two or more.
        shared: take the items that all records have, instead of refusing records of different items.

    Raises:
        DataError: records of different items (unless ``shared``, and some are the same), or nothing in common.
    """
    notes: list[str] = []
    families: list[list[tuple[Result, ...]]] = [_texts(records, notes), [record.tasks for record in records]]
    targets: list[Target] = []
    for family in families:
        for place in range(len(family[0])):
            target = _target(family, place, records, shared, notes)
            if target is not None:
                targets.append(target)
    notes += _extra(families)
    if not targets:
        raise DataError(f"the records have no text and no task in common: {_what_each_has(records, notes)}")
    return _unique(targets), tuple(dict.fromkeys(notes))


def _texts(records: Sequence[Record], notes: list[str]) -> list[tuple[Result, ...]]:
    """The texts; none where tokenizers differ, because then the tokens do not match."""
    if len({record.tokenizer_hash for record in records}) == 1:
        return [record.texts for record in records]
    if any(record.texts for record in records):
        notes.append(
            "the records are of different tokenizers, whose tokens do not match: texts are left out, tasks are compared"
        )
    return [() for _ in records]


def _target(
    family: Sequence[Sequence[Result]], place: int, records: Sequence[Record], shared: bool, notes: list[str]
) -> Target | None:
    first = family[0][place]
    found = [first, *(_counterpart(first, family[0], others) for others in family[1:])]
    results = tuple(result for result in found if result is not None)
    if len(results) < len(found):
        lacking = [record.model.source for record, result in zip(records, found, strict=True) if result is None]
        notes.append(f"{_named(first)} is left out: not in the record of {', '.join(lacking)}")
        return None
    keys = [_keys(result) for result in results]
    _check_bos(results, records, keys)
    common = set(keys[0]).intersection(*keys[1:])
    if any(len(common) < len(own) for own in keys):
        _check_shared(results, records, keys, shared)
        most = max(len(own) for own in keys)
        notes.append(f"{_named(first)}: only the {len(common)} shared items of up to {most} are compared")
    order = [key for key in keys[0] if key in common]
    rows = tuple(np.array([own[key] for key in order], dtype=np.int64) for own in keys)
    _check_same_questions(results, rows, records)
    return Target(_short_name(first), results, rows)


def _counterpart(first: Result, references: Sequence[Result], others: Sequence[Result]) -> Result | None:
    """The result of another record on the same items; else one of the same name that is not for another reference."""
    alike = [other for other in others if _same_kind(first, other)]
    exact = [other for other in alike if np.array_equal(other.items.ids, first.items.ids)]
    if exact:
        return exact[0]
    taken = {reference.items.fingerprint for reference in references}
    free = [other for other in alike if other.items.fingerprint not in taken]
    same = [other for other in free if not _other_settings(first, other)]
    return next(iter([*same, *free]), None)


def _same_kind(first: Result, other: Result) -> bool:
    if isinstance(first, TextResult) and isinstance(other, TextResult):
        return first.convention == other.convention and (first.name == other.name or first.sha256 == other.sha256)
    return first.name == other.name


def _keys(result: Result) -> dict[Key, int]:
    """Hash and occurrence of each item -> its row."""
    seen: dict[int, int] = {}
    keys = {}
    for row, item in enumerate(result.items.ids.tolist()):
        seen[item] = seen.get(item, 0) + 1
        keys[item, seen[item]] = row
    return keys


def _check_bos(results: Sequence[Result], records: Sequence[Record], keys: Sequence[dict[Key, int]]) -> None:
    """Refuse windows with BOS beside windows without, even where some are the same: the figures do not compare."""
    begins = [bool(result.settings.get("bos")) for result in results]
    if len(set(begins)) == 1 or all(own.keys() == keys[0].keys() for own in keys):
        return
    named = [{True: "with", False: "without"}[begin] for begin in begins]
    shown = ", ".join(f"{word} in {record.model.source}" for word, record in zip(named, records, strict=True))
    raise DataError(
        f"{_named(results[0])} was scored with BOS at the start of every window in some records and without in others "
        f"({shown}): such figures do not compare. Evaluate all models with --bos always, or all with --bos never."
    )


def _check_shared(
    results: Sequence[Result], records: Sequence[Record], keys: Sequence[dict[Key, int]], shared: bool
) -> None:
    """Refuse results of different items, unless shared ones were asked for and there are any."""
    common = len(set(keys[0]).intersection(*keys[1:]))
    if shared and common:
        return
    counts = ", ".join(f"{len(own)} in {record.model.source}" for own, record in zip(keys, records, strict=True))
    settings = next((text for other in results[1:] if (text := _other_settings(results[0], other))), "")
    way = "compare the shared items alone with --shared (shared=True)" if common else "nothing can be paired as it is"
    raise DataError(
        f"the records are of different items of {_named(results[0])}: {counts}; {common} are shared.{settings} "
        f"Evaluate all models on the same data with the same settings and --limit, or leave one out; {way}."
    )


def _other_settings(first: Result, other: Result) -> str:
    """A sentence on the settings that differ, or ``""``."""
    names = sorted({*first.settings, *other.settings})
    differ = [name for name in names if first.settings.get(name) != other.settings.get(name)]
    if not differ:
        return ""
    shown = [f"{name} {first.settings.get(name)!r:.60} and {other.settings.get(name)!r:.60}" for name in differ]
    return f" Their settings differ: {'; '.join(shown)}."


def _check_same_questions(results: Sequence[Result], rows: Sequence[Rows], records: Sequence[Record]) -> None:
    """Same hash, same gold answer, same number of tokens: anything else is a damaged record."""
    column = "tokens" if isinstance(results[0], TextResult) else "gold"
    first: Any = results[0].items[column][rows[0]]
    for result, own, record in zip(results[1:], rows[1:], records[1:], strict=True):
        wrong = int(np.count_nonzero(result.items[column][own] != first))
        if wrong:
            raise DataError(
                f"{_named(result)} in the record of {record.model.source}: {wrong} items have other {column} than the "
                f"same items in the record of {records[0].model.source}; one of the two is damaged. Evaluate again."
            )


def _extra(families: Sequence[Sequence[Sequence[Result]]]) -> list[str]:
    """What other records have and the first has not."""
    names: list[str] = []
    for first, *others in families:
        known = [other for results in others for other in results if not any(_same_kind(one, other) for one in first)]
        names += dict.fromkeys(_named(result) for result in known)
    return [f"{', '.join(names)}: left out, not in the first record"] if names else []


def _what_each_has(records: Sequence[Record], notes: Sequence[str]) -> str:
    parts = []
    for record in records:
        results: tuple[Result, ...] = (*record.texts, *record.tasks)
        parts.append(f"{record.model.source} has {', '.join(map(_named, results)) or 'nothing'}")
    tokenizers = " The records are of different tokenizers, whose tokens do not match." * any(
        "different tokenizers" in note for note in notes
    )
    return "; ".join(parts) + f".{tokenizers} Evaluate the models on the same tasks."


def _named(result: Result) -> str:
    name = "".join(letter if letter.isprintable() else "?" for letter in result.name)
    return f"{name} ({result.convention})" if isinstance(result, TextResult) else name


def _short_name(result: Result) -> str:
    """Without the folders of a path, and with the convention where it is not the usual one."""
    name = _named(result).removesuffix(" (segments)")
    return name.rsplit("/", 1)[-1] if name.startswith(("/", "./", "../", "~/")) else name


def _unique(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Names that occur twice get the settings of windows, and a number if that is not enough."""
    names = [target.name for target in targets]
    longer = []
    for target in targets:
        seqlen = target.results[0].settings.get("seqlen")
        double = names.count(target.name) > 1 and seqlen is not None
        longer.append(f"{target.name}, {seqlen} tokens" if double else target.name)
    final = [name if longer.index(name) == i else f"{name} #{i + 1}" for i, name in enumerate(longer)]
    return tuple(dataclasses.replace(target, name=name) for target, name in zip(targets, final, strict=True))

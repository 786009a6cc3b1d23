"""Records -> candidates: which records are calibration seeds of one recipe, and what each candidate is called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from calib.errors import UsageError
from evals.comparison.types import Candidate
from evals.record import Record

__all__ = ["Group", "pool"]

_OF_THE_DRAW = ("seed", "fingerprint")  # what two calibration seeds of one recipe differ in


@dataclasses.dataclass(frozen=True)
class Group:
    """A candidate and where its records are.

    Args:
        candidate: as tables show it.
        places: index of each of its records among all.
        calibrated: whether calibration data had a part in it, so that another seed gives another model.
    """

    candidate: Candidate
    places: tuple[int, ...]
    calibrated: bool

    @property
    def label(self) -> str:
        return self.candidate.label


def pool(records: Sequence[Record], labels: Sequence[str] | None = None) -> tuple[Group, ...]:
    """Candidates in the order of their first records.

    Without labels, records are pooled whose architecture, size, tokenizer, recipe and calibration agree in all but the
    seed. A record that names no recipe, or a seed that is there already, stands alone. With labels, those of one label
    are pooled: so models of other tools, which bring no recipe, can be pooled too.

    Args:
        records: one or more.
        labels: one per record.

    Raises:
        UsageError: another number of labels than records, one label for the same model twice or for different recipes.
    """
    places = _by_recipe(records) if labels is None else _by_label(records, labels)
    names = (
        _names([records[group[0]] for group in places]) if labels is None else [labels[group[0]] for group in places]
    )
    return tuple(_group(records, group, name) for group, name in zip(places, names, strict=True))


def _group(records: Sequence[Record], places: Sequence[int], label: str) -> Group:
    members = [records[place] for place in places]
    bits = [record.model.bits_per_weight for record in members if record.model.bits_per_weight is not None]
    candidate = Candidate(
        label=label,
        sources=tuple(record.model.source for record in members),
        seeds=tuple(_seed(record) for record in members),
        bytes=sum(record.model.bytes for record in members) / len(members),
        bits_per_weight=sum(bits) / len(bits) if len(bits) == len(members) else None,
    )
    return Group(candidate, tuple(places), any(record.model.calibration is not None for record in members))


def _by_recipe(records: Sequence[Record]) -> list[list[int]]:
    groups: dict[tuple[str, int], list[int]] = {}
    for place, record in enumerate(records):
        key, seed = _recipe_key(record), _seed(record)
        alone = record.model.recipe is None or seed is None
        number = 0
        while (key, number) in groups and (
            alone or seed in {_seed(records[other]) for other in groups[key, number]}
        ):  # another model of the same recipe and seed is no draw of a seed
            number += 1
        groups.setdefault((key, number), []).append(place)
    return list(groups.values())


def _by_label(records: Sequence[Record], labels: Sequence[str]) -> list[list[int]]:
    if len(labels) != len(records):
        raise UsageError(f"labels: {len(labels)}, records: {len(records)}; give one label per record, in their order.")
    groups: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    for label, places in groups.items():
        _check_pooled(label, [records[place] for place in places])
    return list(groups.values())


def _check_pooled(label: str, members: Sequence[Record]) -> None:
    prints = [record.model.fingerprint for record in members if record.model.fingerprint]
    if len(set(prints)) < len(prints):
        raise UsageError(
            f"the label {label!r} is given to the same model more than once. Records of one label are pooled as "
            "calibration seeds, and a copy is no other seed: leave it out, or give it a label of its own."
        )
    if len({_recipe_key(record) for record in members if record.model.recipe is not None}) > 1:
        raise UsageError(
            f"the label {label!r} is given to records of different recipes: {', '.join(map(_own_name, members))}. "
            "Records of one label are pooled as calibration seeds; give each recipe a label of its own."
        )


def _recipe_key(record: Record) -> str:
    model = record.model
    if model.recipe is None:
        return f"{model.source} {model.fingerprint}"
    calibration = {k: v for k, v in (model.calibration or {}).items() if k not in _OF_THE_DRAW}
    parts = [model.architecture, model.parameters, record.tokenizer_hash, _without_seeds(model.recipe), calibration]
    return json.dumps(parts, sort_keys=True, default=str)


def _without_seeds(value: Any) -> Any:
    """JSON data without fields called ``seed``, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_seeds(inner) for name, inner in value.items() if name != "seed"}
    return [_without_seeds(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _seed(record: Record) -> int | None:
    seed = (record.model.calibration or {}).get("seed")
    return seed if isinstance(seed, int) else None


def _names(records: Sequence[Record]) -> list[str]:
    """Short labels; where two would be the same, the model's name is added, and a number if need be."""
    short = [_own_name(record) for record in records]
    longer = [
        f"{name} ({_last_part(record.model.source)})" if short.count(name) > 1 else name
        for name, record in zip(short, records, strict=True)
    ]
    return [name if longer.index(name) == i else f"{name} #{i + 1}" for i, name in enumerate(longer)]


def _own_name(record: Record) -> str:
    recipe = record.model.recipe
    if recipe is None:
        return _last_part(record.model.source)
    scheme = recipe.get("scheme")
    if not isinstance(scheme, Mapping) or "name" not in scheme:
        return str(recipe.get("method", _last_part(record.model.source)))
    mixed = " mixed" if recipe.get("overrides") else ""
    return f"{recipe.get('method', 'quantized')} {scheme['name']}{mixed}"


def _last_part(source: str) -> str:
    last = source.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or source
    return "".join(letter if letter.isprintable() else "?" for letter in last)

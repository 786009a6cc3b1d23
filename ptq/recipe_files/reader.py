"""A recipe from a YAML file. Whatever is wrong is said with file, line, and what to write instead."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import yaml

from ptq.errors import PtqError, UsageError, unknown_name
from ptq.methods import METHODS, find_method, make_config
from ptq.recipe_files.other_names import other_name
from ptq.recipe_files.safe_yaml import KeyPath, YamlFile, read_yaml
from ptq.scheme import Scheme

__all__ = ["read_recipe"]

_MAX_KEYS = 1000  # beyond this many, the line of a wrong value is not searched for
_EXAMPLE = "write for example 'method: coreq' and, below it, 'scheme: {bits: 3}'"


class _Recipe(Protocol):
    """What is read: `ptq.recipe.Recipe`, which reads itself with this module and cannot be imported here."""

    @property
    def method(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self: ...


R = TypeVar("R", bound=_Recipe)


def read_recipe(path: Path, kind: type[R]) -> R:
    """The recipe in a YAML file, its method and the method's options checked.

    Args:
        path: the file.
        kind: `ptq.recipe.Recipe`.

    Raises:
        UsageError: the file is missing, is not YAML, is empty, or does not describe a recipe.
    """
    file = read_yaml(path)
    if file.data is None or file.data == {}:
        raise UsageError(
            f"the recipe {path} is empty: a recipe has at least one key, for example 'method: coreq'. Is it the right "
            "file?"
        )
    if not isinstance(file.data, Mapping):
        found = type(file.data).__name__
        raise UsageError(f"{path}, line 1: a recipe must be a mapping of keys to values, got {found}: {_EXAMPLE}.")
    places = _Places.of(kind)
    for place, key in places.unknown_keys(file.data):
        raise _at(path, file.lines.get((*place, key)), places.advice(file.data, place, key))
    try:
        return _checked(kind, file.data)
    except PtqError as error:
        raise _at(path, _line(kind, file, str(error)), str(error).removeprefix("recipe.")) from error


def _checked(kind: type[R], data: Mapping[str, Any]) -> R:
    recipe = kind.from_dict(data)
    make_config(find_method(recipe.method), recipe.options)
    return recipe


def _at(path: Path, line: int | None, text: str) -> UsageError:
    return UsageError(f"{path}: {text}" if line is None else f"{path}, line {line}: {text}")


# -- keys --------------------------------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """The keys of the top of a recipe and of its sections."""

    top: tuple[str, ...]
    sections: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, kind: type[Any]) -> _Places:
        """The places of a recipe: its fields, and those of the records among them."""
        defaults = kind()
        records = {name: getattr(defaults, name) for name in _names(kind)}
        sections = {name: _names(type(value)) for name, value in records.items() if dataclasses.is_dataclass(value)}
        return cls(_names(kind), sections)

    def unknown_keys(self, data: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
        """Every key that its place does not have, with the place."""
        yield from (((), str(key)) for key in data if key not in self.top)
        for section, known in self.sections.items():
            if isinstance(data.get(section), Mapping):
                yield from (((section,), str(key)) for key in data[section] if key not in known)
        rows = data.get("overrides")
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            if isinstance(row, Mapping):
                yield from ((("overrides", number), str(key)) for key in row if key not in self.known(("overrides",)))

    def known(self, place: KeyPath) -> tuple[str, ...]:
        """The keys of a place; a row of overrides has those of a scheme."""
        if not place:
            return self.top
        return self.sections[str(place[0])] if place[0] in self.sections else (*_names(Scheme), "pattern")

    def advice(self, data: Mapping[str, Any], place: KeyPath, key: str) -> str:
        """What to write instead of a key that its place does not have."""
        value: Any = data
        for step in place:
            value = value[step]
        value = next(found for name, found in value.items() if str(name) == key)
        where = f"under {place[0]!r}" if place else "at the top"
        home = self.home(key)
        if home is not None and place[:1] not in (home, ("overrides",)):
            there = f"under {home[0]!r}" if home else "at the top, beside 'method'"
            return f"the key {key!r} does not stand {where} but {there}: write {_written(home, key, value)}."
        foreign = other_name("recipe", key)
        if foreign is not None:
            return f"there is no key {key!r} {where}. {foreign}"
        return str(unknown_name(f"key {where}", key, self.known(place)))

    def home(self, key: str) -> KeyPath | None:
        """The section that a key belongs to; ``()`` is the top."""
        if key in self.top:
            return ()
        for section, known in self.sections.items():
            if key in known:
                return (section,)
        return ("options",) if any(key in _names(method.config) for method in METHODS.values()) else None


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _written(home: KeyPath, key: str, value: Any) -> str:
    """A key in its section as one line of YAML."""
    data: Any = {key: value if isinstance(value, str | int | float | bool) else None}
    for step in reversed(home):
        data = {step: data}
    text = yaml.safe_dump(data, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removeprefix("{").removesuffix("}") if len(text) < 200 else f"{key} there"


# -- values ------------------------------------------------------------------------------------------------------------


def _line(kind: type[R], file: YamlFile, message: str) -> int | None:
    """The line of the value with which an error comes up: the file's values are given to a recipe one after another."""
    grown: Any = {}
    for number, (path, value) in enumerate(_leaves(file.data)):
        if number == _MAX_KEYS:
            return None
        _insert(grown, file.data, path, value)
        if _message(kind, grown) == message:
            return next((file.lines[path[:i]] for i in range(len(path), 0, -1) if path[:i] in file.lines), None)
    return None


def _message(kind: type[R], data: Mapping[str, Any]) -> str | None:
    try:
        _checked(kind, copy.deepcopy(data))
    except PtqError as error:
        return str(error)
    return None


def _leaves(data: Any, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Scalars and empty containers with their paths, in the order of the file."""
    entries = list(data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ())
    if not entries:
        yield above, data
    for key, value in entries:
        yield from _leaves(value, (*above, key))


def _insert(grown: Any, data: Any, path: KeyPath, value: Any) -> None:
    """Put a value of ``data`` into ``grown``, whose mappings and lists are made as they are needed."""
    for step in path[:-1]:
        data = data[step]
        if isinstance(grown, dict) and step not in grown:
            grown[step] = type(data)()
        elif isinstance(grown, list) and len(grown) == step:
            grown.append(type(data)())
        grown = grown[step]
    if isinstance(grown, list):
        grown.append(value)
    else:
        grown[path[-1]] = value

"""YAML from a user's file: plain data only, bounded in size and depth, and the line of every key.

The safe loader alone runs nothing, but it follows aliases (a few lines that stand for gigabytes once they are printed),
takes the last of two equal keys, and reads YAML 1.1: ``1e-3`` is a string there, ``off`` is false, ``010`` is 8 and
``1:30`` is 90. Here a plain scalar is what the core schema of YAML 1.2 says, as everybody expects.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ptq.errors import UsageError

try:
    from yaml import CSafeLoader as _BaseLoader
except ImportError:  # PyYAML without its C library: the same, slower
    from yaml import SafeLoader as _BaseLoader  # type: ignore[assignment]

__all__ = ["MAX_YAML_BYTES", "KeyPath", "YamlFile", "read_yaml"]

MAX_YAML_BYTES = 4 << 20
MAX_DEPTH = 16
KeyPath = tuple[str | int, ...]
"""Keys and list positions on the way to a value, e.g. ``("overrides", 0, "bits")``."""


class YamlFile(NamedTuple):
    """What a file holds: plain data (``None`` if nothing), and the line, from 1, of every key and list entry."""

    data: Any
    lines: dict[KeyPath, int]


class _Loader(_BaseLoader):
    """The safe loader with the plain scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (as in the base class)


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _kind, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> YamlFile:
    """The plain data of a UTF-8 YAML file and where it stands.

    Raises:
        UsageError: the file cannot be read or exceeds `MAX_YAML_BYTES`, is not YAML, has more than `MAX_DEPTH` levels,
            or uses what a recipe has no need of: anchors, aliases, tags (``!!python/...``), a key twice.
    """
    try:
        with path.open("rb") as handle:
            text = handle.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}.") from error
    if len(text) > MAX_YAML_BYTES:
        raise UsageError(f"the recipe {path} is larger than the limit of {MAX_YAML_BYTES} bytes.")
    try:
        return _construct(text.decode("utf-8"), path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1},"
        raise UsageError(f"the recipe {path}{where} is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # numbers raise the last two
        raise UsageError(f"the recipe {path} is not valid YAML: {error}") from error


def _construct(text: str, path: Path) -> YamlFile:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):  # no recursion here, and it stops at the first thing refused
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refuse(path, event, f"more than {MAX_DEPTH} levels of lists and mappings")
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:  # of an alias as well
            raise _refuse(path, event, f"the anchor or alias {anchor!r}; write the value out")
        if tag is not None:
            raise _refuse(path, event, f"the tag {tag!r}; a recipe is made of plain values")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        _note_lines(node, (), lines, path)
        return YamlFile(None if node is None else loader.construct_document(node), lines)
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node | None, above: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
    """The line of every key and entry; a mapping with two equal keys is refused."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*above, key.value) if isinstance(key, yaml.ScalarNode) else above
            if here in lines and here != above:  # keys that are no scalars are refused when the mapping is made
                raise _refuse(path, key, f"the key {key.value!r} twice in one mapping")
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*above, number)] = value.start_mark.line + 1
            _note_lines(value, (*above, number), lines, path)


def _refuse(path: Path, where: Any, what: str) -> UsageError:
    mark = where.start_mark
    return UsageError(f"the recipe {path}, line {mark.line + 1}, column {mark.column + 1}, has {what}.")

"""YAML from a user's file: plain data only, bounded in size and depth.

The safe loader alone runs nothing, but it follows aliases (a few lines that stand for gigabytes once they are printed),
takes the last of two equal keys, and raises errors of many classes on odd numbers and dates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ptq.errors import UsageError

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML without its C library: the same, slower
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

__all__ = ["MAX_YAML_BYTES", "read_yaml"]

MAX_YAML_BYTES = 4 << 20
MAX_DEPTH = 16


def read_yaml(path: Path) -> Any:
    """The plain data of a UTF-8 YAML file; ``None`` for an empty one.

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
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers raise the last two
        raise UsageError(f"the recipe {path} is not valid YAML: {error}") from error


def _construct(text: str, path: Path) -> Any:
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
        _check_keys(node, path)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node | None, path: Path) -> None:
    """Refuse a mapping with two equal keys."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):  # others are refused when the mapping is made
                if key.value in seen:
                    raise _refuse(path, key, f"the key {key.value!r} twice in one mapping")
                seen.add(key.value)
            _check_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, path)


def _refuse(path: Path, where: Any, what: str) -> UsageError:
    mark = where.start_mark
    return UsageError(f"the recipe {path}, line {mark.line + 1}, column {mark.column + 1}, has {what}.")

"""JSON from a model folder: bounded in bytes and in depth before anybody works with it.

Python's parser takes any size, any number of levels it has stack for, ``NaN``, and the last of two equal keys. Code
that reads the result afterwards (copies, comparisons, writers) fails on such data far from its cause.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.errors import ModelError, PtqError

__all__ = ["MAX_DEPTH", "parse_json", "quoted", "read_json"]

MAX_DEPTH = 32
"""Levels of lists and objects inside each other. Configs of models have about five."""


def read_json(path: Path, limit: int, *, strict: bool = False, error: type[PtqError] = ModelError) -> Any:
    """Parse a UTF-8 file of at most ``limit`` bytes; see `parse_json`.

    Raises:
        PtqError: of the class ``error``: the file cannot be read, is larger, or `parse_json` refuses it.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            text = handle.read(size) if size <= limit else b""  # takes memory for what it is asked for at once
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}.") from problem
    if size > limit:
        raise error(
            f"{path} has {size} bytes and is larger than {limit} bytes, the limit for such a file: it is damaged."
        )
    return parse_json(text, str(path), strict=strict, error=error)


def parse_json(text: bytes, where: str, *, strict: bool = False, error: type[PtqError] = ModelError) -> Any:
    """Plain data from UTF-8 JSON with at most `MAX_DEPTH` levels and no NaN.

    Args:
        text: the bytes.
        where: what to call them in a message.
        strict: refuse two equal keys in an object and infinite numbers too. Configs of models hold ``Infinity`` (limits
            of time steps), files that tell where tensors lie have no use for either.
        error: the class of what is raised.

    Raises:
        PtqError: not UTF-8, not JSON, too deep, NaN; if ``strict`` also equal keys or infinite numbers.
    """
    pairs = _unique if strict else None
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=_constant(strict))
    except RecursionError as problem:
        raise _too_deep(where, error) from problem
    except ValueError as problem:
        raise error(f"{where} is damaged: {problem}. Fetch the file again.") from problem
    _check_depth(data, where, error)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(again)} is there twice")
    return found


def _constant(strict: bool) -> Callable[[str], float]:
    def read(name: str) -> float:
        if strict or name == "NaN":
            raise ValueError(f"it holds {name}, which is no JSON number")
        return float(name)

    return read


def _check_depth(data: Any, where: str, error: type[PtqError]) -> None:
    """Level by level and not by recursion, so that the check itself cannot run out of stack."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        nested = [part for part in level if isinstance(part, dict | list) and part]
        if not nested:
            return
        level = [x for part in nested for x in (part.values() if isinstance(part, dict) else part)]
    raise _too_deep(where, error)


def _too_deep(where: str, error: type[PtqError]) -> PtqError:
    return error(
        f"{where} is nested deeper than {MAX_DEPTH} levels: it is damaged, or made to do harm. Fetch it again."
    )


def quoted(value: object) -> str:
    """What a file holds, as it may stand in a message: quoted, without control characters, not longer than 80."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 80 else text[:77] + "...")

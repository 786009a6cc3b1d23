"""Files of rows: a JSON array, one JSON object per line, or parquet; every row with the words for its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calib.errors import DataError

__all__ = ["ROW_SUFFIXES", "decoded", "file_rows"]

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """``(where, row)`` of every row of a file with one of `ROW_SUFFIXES`.

    Raises:
        DataError: the file cannot be read, or is not what its suffix says; file and line are named.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    text = decoded(path)
    whole = _whole(path, text)
    if whole is None:
        return _lines(path, text)
    return ((f"{path}, row {number}", row) for number, row in enumerate(whole, start=1))


def decoded(path: Path) -> str:
    """The characters of a UTF-8 file, unchanged; a byte order mark is taken off.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from error


def _whole(path: Path, text: str) -> Sequence[Any] | None:
    """The rows of a file that is one JSON array or one object; ``None`` for a row per line."""
    start = text.lstrip()[:1]
    lines = path.suffix.lower() != ".json"
    if start != "[" and (lines or start != "{"):
        return None
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deep for rows of text.") from error
    except ValueError as error:
        if lines or start == "{":  # then it is a row per line, and what is wrong is said by line
            return None
        raise DataError(f"{path} is not JSON: {error}.") from error
    return found if isinstance(found, list) else [found]


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows of lines. They end at a line feed only: JSON strings may hold other separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except RecursionError as error:
            raise DataError(f"{where} is nested too deep for a row of text.") from error
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON: {error}. The suffix {path.suffix} promises rows; give plain text as a .txt file."
            ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets  # imported here: it takes a second, and most runs do not need it

    try:
        rows = iter(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except DataError:
        raise
    except Exception as error:  # the library and what it reads through raise errors of many unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise DataError(f"cannot read {path} as parquet ({type(error).__name__}: {reason}).") from error

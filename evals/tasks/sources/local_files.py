"""Rows of tasks from a folder of JSONL files: which file it is, its lines, and the settings of a task of one's own.

DIR/NAME.jsonl  or  DIR/NAME.PART.jsonl       the rows; also in DIR/tasks/, also under an alias of the task
DIR/NAME.fewshot.jsonl, DIR/NAME.train.jsonl  examples for few-shot prompts
DIR/NAME.task.json                            prompt, delimiter, metric ... of a task that the table does not have
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib.checkpoint.json import quoted
from calib.data.chat import require_characters
from calib.data.rows import decoded
from calib.errors import DataError
from evals.tasks.types import Row

__all__ = ["custom_names", "find_examples", "find_rows", "find_settings", "read_object", "read_rows"]

_EXAMPLES = ("fewshot", "train")
_LISTED = 12
"""File names that a message shows of a folder."""


def find_rows(names: Sequence[str], folder: Path) -> Path:
    """The file with a task's rows.

    Args:
        names: the task's name, then its aliases.
        folder: given by the user; its subfolder ``tasks`` is looked into as well.

    Raises:
        DataError: no such folder, no such file, or several of them and none has exactly the name.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder} for the rows of {names[0]!r}; --data takes a folder of JSONL files."
        )
    exact = [path for name in names for path in _existing(folder, f"{name}.jsonl")]
    parts = [path for name in names for path in _parts(folder, name)]
    if exact:
        return exact[0]
    if len(parts) > 1:
        raise DataError(
            f"several files could hold the rows of {names[0]!r}: {', '.join(map(str, parts))}. Name the one to be used "
            f"{names[0]}.jsonl, or leave one."
        )
    if parts:
        return parts[0]
    looked_for = " or ".join(part for name in names for part in (f"{name}.jsonl", f"{name}.*.jsonl"))
    raise DataError(
        f"{folder} has no rows for {names[0]!r}: looked for {looked_for}, also in tasks/. {_contents(folder)}"
    )


def find_examples(names: Sequence[str], folder: Path) -> Path | None:
    """The file with examples, ``NAME.fewshot.jsonl`` before ``NAME.train.jsonl``; ``None`` if there is none."""
    candidates = (f"{name}.{kind}.jsonl" for kind in _EXAMPLES for name in names)
    return next((path for candidate in candidates for path in _existing(folder, candidate)), None)


def find_settings(name: str, folder: Path) -> Path | None:
    """``NAME.task.json``, or ``None``."""
    return next(iter(_existing(folder, f"{name}.task.json")), None)


def custom_names(folder: Path) -> tuple[str, ...]:
    """Names of the files of rows in a folder, up to their first dot."""
    paths = (path for place in _places(folder) for path in place.glob("*.jsonl") if path.is_file())
    return tuple(sorted({path.name.split(".")[0] for path in paths if not _is_examples(path)} - {""}))


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """``(where, row)`` of each line that is not empty; a line feed at the end of a ``query`` is taken off.

    Raises:
        DataError: the file cannot be read, is not UTF-8, has no rows, or a line is not a JSON object of characters.
    """
    rows: list[tuple[str, Row]] = []
    for number, line in enumerate(decoded(path).split("\n"), start=1):  # JSON strings may hold other line separators
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, _without_line_feed(_object(line, where))))
    if not rows:
        raise DataError(f"{path} has no rows: one JSON object per line is expected.")
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: the file cannot be read or is something else.
    """
    return _object(decoded(path), str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deep for a row of a task.") from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object: {quoted(text.strip())}.")
    for field, value in row.items():
        _require_characters(value, where, field)
    return row


def _require_characters(value: Any, where: str, field: str) -> None:
    """Every text in a field, at any depth, can be written as UTF-8."""
    level = [value]
    while level:
        for text in (part for part in level if isinstance(part, str)):
            require_characters(text, where, field)
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [x for part in nested for x in ((*part, *part.values()) if isinstance(part, dict) else part)]


def _without_line_feed(row: dict[str, Any]) -> Row:
    query = row.get("query")
    return row | {"query": query.removesuffix("\n")} if isinstance(query, str) else row


def _places(folder: Path) -> tuple[Path, Path]:
    return folder, folder / "tasks"


def _existing(folder: Path, name: str) -> list[Path]:
    return [place / name for place in _places(folder) if (place / name).is_file()]


def _parts(folder: Path, name: str) -> list[Path]:
    found = (path for place in _places(folder) for path in sorted(place.glob(f"{glob.escape(name)}.*.jsonl")))
    return [path for path in found if path.is_file() and not _is_examples(path)]


def _is_examples(path: Path) -> bool:
    return path.name.split(".")[-2] in _EXAMPLES


def _contents(folder: Path) -> str:
    names = sorted(str(path.relative_to(folder)) for place in _places(folder) for path in place.glob("*.jsonl"))
    if not names:
        return "There is no .jsonl file."
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"There is: {', '.join(names[:_LISTED])}{more}."

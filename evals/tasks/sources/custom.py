"""Tasks of the user's own: a file of rows, and beside it, if wanted, ``NAME.task.json`` that says how to ask."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from calib.checkpoint.json import quoted
from calib.errors import DataError, unknown_name
from evals.tasks.metrics import METRICS
from evals.tasks.prompts import kind_of
from evals.tasks.sources.local_files import find_rows, find_settings, read_object, read_rows
from evals.tasks.types import Kind, Row, Task

__all__ = ["read_custom"]

_PROMPT: dict[Kind, str] = {"choices": "{query}", "partial_context": "{context}", "continuation": "{context}"}
_FIELDS = ("prompt", "delimiter", "metric", "chance", "description", "summary")


def read_custom(name: str, data: Path) -> tuple[Task, str, list[tuple[str, Row]], tuple[str, ...]]:
    """A task that only the folder knows.

    Returns:
        The task, its source, ``(where, row)`` of each row, and notes.

    Raises:
        DataError: the file is missing, unreadable or not of rows, or its settings are not as they should be.
    """
    path = find_rows((name,), data)
    rows = read_rows(path)
    kind = kind_of(rows[0][1], rows[0][0])
    task = Task(name, "a task of your own", kind, _PROMPT[kind], "acc", None)
    settings = find_settings(name, data)
    if settings is not None:
        return _with_settings(task, settings), str(path), rows, ()
    generic = "the query, a space, the choice" if kind == "choices" else "the context, a space, the continuation"
    return task, str(path), rows, (f"a task without settings of its own: asked as {generic}",)


def _with_settings(task: Task, path: Path) -> Task:
    """The task with what ``NAME.task.json`` says."""
    settings = read_object(path)
    for field, value in settings.items():
        _check_field(field, value, path)
    changed = dataclasses.replace(task, **settings)
    place = _PROMPT[task.kind]
    if place not in changed.prompt:
        raise DataError(
            f"{path}: the prompt {quoted(changed.prompt)} must hold {place}, where the text of the row is put."
        )
    return changed


def _check_field(field: str, value: Any, path: Path) -> None:
    if field not in _FIELDS:
        raise DataError(f"{path}: {unknown_name('field', field, _FIELDS)}")
    if field == "chance":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= 1):
            raise DataError(f"{path}: 'chance' is {quoted(value)}, but it must be a number from 0 to 1, or null.")
    elif not isinstance(value, str):
        raise DataError(f"{path}: {field!r} is {quoted(value)}, but it must be a string.")
    if field == "metric" and value not in METRICS:
        raise DataError(f"{path}: {unknown_name('metric', value, METRICS)}")

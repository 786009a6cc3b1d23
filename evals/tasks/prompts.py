"""One row of a task -> one question, zero-shot. Every field is checked here, whatever it was read from."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping
from typing import Any

from calib.checkpoint.json import quoted
from calib.errors import DataError
from evals.tasks.types import Kind, Question, Row, Task

__all__ = ["FIELDS", "PromptedExample", "build_prompt", "fill", "kind_of"]

FIELDS: dict[Kind, tuple[str, ...]] = {
    "choices": ("query", "choices", "gold"),
    "partial_context": ("context_options", "continuation", "gold"),
    "continuation": ("context", "continuation"),
}
_PLACE = re.compile(r"\{(query|context|choices|subject)\}")
_LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class PromptedExample:
    """A question, the subject of its row, and the words for its place in messages."""

    question: Question
    subject: str | None
    where: str

    @property
    def example(self) -> str:
        """Question and right answer, as an example in a prompt."""
        return "".join(self.question.pairs[self.question.gold])


def build_prompt(task: Task, row: Row, where: str) -> PromptedExample:
    """The question that a row asks.

    Args:
        task: its prompt, delimiter and kind.
        row: with the fields of the kind.
        where: file and line, for messages.

    Raises:
        DataError: a field is missing, has the wrong type, is empty, or ``gold`` is out of range.
    """
    checked = _RowFields(row, where, task)
    make = {"choices": _choices, "partial_context": _partial_context, "continuation": _continuation}[task.kind]
    return PromptedExample(make(task, checked), checked.subject(), where)


def kind_of(row: Row, where: str) -> Kind:
    """Of which kind a row is, by its fields.

    Raises:
        DataError: of none.
    """
    for kind in FIELDS:
        if FIELDS[kind][0] in row:
            return kind
    raise DataError(
        f"{where} is not a row of a task: it has {', '.join(map(quoted, row)) or 'no field'}. Expected are "
        + "; or ".join(", ".join(fields) for fields in FIELDS.values())
        + "."
    )


def fill(template: str, fields: Mapping[str, str]) -> str:
    """``template`` with its places replaced once: what is put in may itself hold braces."""
    return _PLACE.sub(lambda place: fields[place[1]], template)


def _choices(task: Task, row: _RowFields) -> Question:
    lettered = "{choices}" in task.prompt
    choices = row.texts("choices", may_be_empty=lettered)
    fields = {"query": row.text("query"), "subject": row.subject() or ""}
    if lettered:
        fields["query"] = fields["query"].strip()  # as the harness does for MMLU
        letters = row.letters(len(choices))
        fields["choices"] = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
        choices = letters
    context = fill(task.prompt, fields)
    answers = tuple(task.answer_prefix + choice for choice in choices)
    return Question(tuple((context, task.delimiter + answer) for answer in answers), answers, row.gold(len(answers)))


def _partial_context(task: Task, row: _RowFields) -> Question:
    options = row.texts("context_options")
    continuation = task.delimiter + row.text("continuation")
    contexts = [fill(task.prompt, {"context": option, "subject": row.subject() or ""}) for option in options]
    # The harness takes the filled-in contexts for the answers, so its lengths for acc_norm are theirs.
    return Question(tuple((context, continuation) for context in contexts), options, row.gold(len(options)))


def _continuation(task: Task, row: _RowFields) -> Question:
    context = fill(task.prompt, {"context": row.text("context", may_be_empty=True), "subject": row.subject() or ""})
    answer = row.text("continuation")
    return Question(((context, task.delimiter + answer),), (answer,), 0)


@dataclasses.dataclass(frozen=True)
class _RowFields:
    """Reading of fields that says what is wrong with them."""

    row: Row
    where: str
    task: Task

    def text(self, field: str, *, may_be_empty: bool = False) -> str:
        value = self._value(field)
        if not isinstance(value, str):
            raise self._error(field, value, "a string")
        if not value.strip() and not may_be_empty:
            raise self._error(field, value, "a text that is not empty")
        return value

    def texts(self, field: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
        values = self._value(field)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(field, values, "a list of strings")
        if len(values) < 2:
            raise self._error(field, values, f"a list of two or more, not of {len(values)}")
        if not may_be_empty and not all(value.strip() for value in values):
            raise self._error(field, values, "a list without empty texts")
        return tuple(values)

    def gold(self, answers: int) -> int:
        value = self._value("gold")
        if type(value) is not int:  # a bool is an int to isinstance
            raise self._error("gold", value, f"a whole number from 0 to {answers - 1}")
        if not 0 <= value < answers:
            raise self._error("gold", value, f"from 0 to {answers - 1}, because there are {answers} answers")
        return value

    def subject(self) -> str | None:
        value = self.row.get("subject")
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self._error("subject", value, "a string that is not empty, or missing")
        return value

    def letters(self, count: int) -> tuple[str, ...]:
        if count > len(_LETTERS):
            raise DataError(f"{self.where}: {count} choices are more than there are letters ({len(_LETTERS)}).")
        return tuple(_LETTERS[:count])

    def _value(self, field: str) -> Any:
        if field not in self.row:
            raise DataError(
                f"{self.where} has no field {field!r}; its fields: {', '.join(map(quoted, self.row)) or 'none'}. "
                f"Rows of {self.task.name!r} have {', '.join(FIELDS[self.task.kind])}."
            )
        return self.row[field]

    def _error(self, field: str, value: object, expected: str) -> DataError:
        return DataError(f"{self.where}: the field {field!r} is {quoted(value)}, but it must be {expected}.")

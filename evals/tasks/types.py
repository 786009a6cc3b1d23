"""What a task is, and what a model is asked: the contract between the tables of tasks and the scoring of answers.

Plain data. `evals.tasks.registry.load_task` makes it, `evals.tasks.loglikelihood` scores it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["HubSource", "Kind", "LoadedTask", "Question", "Row", "Task"]

Kind = Literal["choices", "partial_context", "continuation"]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class HubSource:
    """Where the hub keeps the rows of a task.

    Args:
        repo: data set, e.g. ``"allenai/ai2_arc"``.
        config: its configuration, ``None`` for the only one.
        split: what is scored.
        fewshot_split: where examples are taken from; ``None`` if there is no split but the scored one.
        convert: a row of the hub -> a row of the task's kind (`Task`), prefix of the task included.
        fewshot_first: examples are the first of each subject, in order, instead of drawn.
    """

    repo: str
    config: str | None
    split: str
    fewshot_split: str | None
    convert: Callable[[Row], Row]
    fewshot_first: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """How rows become questions.

    Rows have, by kind: ``choices``: ``query``, ``choices``, ``gold``. ``partial_context``: ``context_options``,
    ``continuation``, ``gold``; the contexts differ and the same continuation is scored after each. ``continuation``:
    ``context``, ``continuation``; there is one answer. All may have a ``subject``.

    Args:
        name: by which it is asked for.
        summary: one line for lists.
        kind: of its rows.
        prompt: what the model reads; ``{query}`` (or ``{context}``) is replaced, and where ``{choices}`` stands the
            choices are listed with letters, and the letters are the answers.
        metric: the one that is customary to quote (`evals.tasks.metrics.METRICS`).
        chance: its value by guessing; ``None`` where guessing has none.
        aliases: other names of the task and of its file.
        delimiter: between prompt and answer; it belongs to the answer's tokens.
        answer_prefix: put before each choice, and counted as part of the answer.
        description: put once before everything else; ``{subject}`` is replaced by the row's.
        hub: ``None`` for a task that is read from a file only.
    """

    name: str
    summary: str
    kind: Kind
    prompt: str
    metric: str
    chance: float | None
    aliases: tuple[str, ...] = ()
    delimiter: str = " "
    answer_prefix: str = ""
    description: str = ""
    hub: HubSource | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """One row, ready to be scored.

    Args:
        pairs: ``(context, continuation)`` of every answer; the continuation begins with the task's delimiter, e.g.
            ``" blue"``.
        answers: of the same length: the answers without the delimiter. Their characters normalise ``acc_norm``, their
            UTF-8 bytes ``acc_bytes``.
        gold: index of the right answer.
        cluster: index into `LoadedTask.clusters`; 0 where there are none.
        where: file and line of the row, or its place in a data set, for messages.
    """

    pairs: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    gold: int
    cluster: int = 0
    where: str = ""


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task with its questions.

    Args:
        task: as in the table, or as a file beside the rows says.
        questions: in the order of the rows.
        source: file or hub data set.
        settings: JSON data that decides what is asked (``fewshot``, ``prompt``, ``limit`` ...).
        clusters: names of the groups of rows that are not independent draws; ``()`` where rows are.
        notes: what a reader of results must know.
    """

    task: Task
    questions: tuple[Question, ...]
    source: str
    settings: dict[str, Any]
    clusters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

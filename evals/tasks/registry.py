"""The zero-shot tasks: one literal table, and `load_task`, which turns a name into questions.

Prompts, splits and customary metrics are those of lm-evaluation-harness 0.4 (docs/tasks.md shows them). A folder of
JSONL files serves instead of the hub, and a file there that the table does not know is a task of the user's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.errors import DataError, UsageError, unknown_name
from evals.tasks.fewshot import FewshotExamples, prefixes
from evals.tasks.prompts import PromptedExample, build_prompt, fill
from evals.tasks.sources import hub_datasets
from evals.tasks.sources.custom import read_custom
from evals.tasks.sources.local_files import custom_names, find_examples, find_rows, find_settings, read_rows
from evals.tasks.types import HubSource, LoadedTask, Question, Row, Task

__all__ = ["TASKS", "known_tasks", "load_task"]

_ANSWER = "{query}\nAnswer:"
_LETTERED = "{query}\n{choices}\nAnswer:"
_ABOUT = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def _ai2(config: str) -> HubSource:
    return HubSource("allenai/ai2_arc", config, "test", "train", hub_datasets.arc)


def _super_glue(config: str, convert: Callable[[Row], Row]) -> HubSource:
    return HubSource("aps/super_glue", config, "validation", "train", convert)


TASKS = (
    Task("arc_easy", "grade-school science", "choices", _ANSWER, "acc", 0.25, hub=_ai2("ARC-Easy")),
    Task("arc_challenge", "harder science", "choices", _ANSWER, "acc_norm", 0.25, hub=_ai2("ARC-Challenge")),
    Task(
        "hellaswag",
        "how a scene goes on",
        "choices",
        "{query}",
        "acc_norm",
        0.25,
        hub=HubSource("Rowan/hellaswag", None, "validation", "train", hub_datasets.hellaswag),
    ),
    Task(
        "piqa",
        "everyday physics",
        "choices",
        _ANSWER,
        "acc_norm",
        0.5,
        hub=HubSource("baber/piqa", None, "validation", "train", hub_datasets.piqa),
    ),
    Task(
        "winogrande",
        "whom a pronoun means",
        "partial_context",
        "{context}",
        "acc",
        0.5,
        hub=HubSource("allenai/winogrande", "winogrande_xl", "validation", "train", hub_datasets.winogrande),
    ),
    Task(
        "boolq",
        "yes or no about a passage",
        "choices",
        _ANSWER,
        "acc",
        0.5,
        hub=_super_glue("boolq", hub_datasets.boolq),
    ),
    Task(
        "openbookqa",
        "science with common knowledge",
        "choices",
        "{query}",
        "acc_norm",
        0.25,
        aliases=("openbook_qa",),
        hub=HubSource("allenai/openbookqa", "main", "test", "train", hub_datasets.openbookqa),
    ),
    Task(
        "copa",
        "cause or effect",
        "choices",
        "{query}",
        "acc",
        0.5,
        answer_prefix=" ",  # with the delimiter two spaces: the harness's choices begin with one
        hub=_super_glue("copa", hub_datasets.copa),
    ),
    Task(
        "lambada_openai",
        "the last word of a story",
        "continuation",
        "{context}",
        "acc",
        None,
        aliases=("lambada",),
        hub=HubSource("EleutherAI/lambada_openai", "default", "test", None, hub_datasets.lambada),
    ),
    Task(
        "mmlu",
        "57 subjects, answered by a letter",
        "choices",
        _LETTERED,
        "acc",
        0.25,
        description=_ABOUT,
        hub=HubSource("cais/mmlu", "all", "test", "dev", hub_datasets.mmlu, fewshot_first=True),
    ),
    Task(
        "sciq",
        "science with a supporting text",
        "choices",
        _ANSWER,
        "acc_norm",
        0.25,
        hub=HubSource("allenai/sciq", None, "test", "train", hub_datasets.sciq),
    ),
)


def known_tasks(data: Path | None = None) -> tuple[str, ...]:
    """Names that `load_task` takes: the table's, and those of files in ``data`` that the table does not know."""
    names = [task.name for task in TASKS]
    taken = {name for task in TASKS for name in (task.name, *task.aliases)}
    own = custom_names(data) if data is not None and data.is_dir() else ()
    return (*names, *(name for name in own if name not in taken))


def load_task(
    name: str, *, data: Path | None = None, limit: int | None = None, fewshot: int = 0, seed: int = 0
) -> LoadedTask:
    """The questions of a task.

    Args:
        name: of the table, an alias, or of a file in ``data``.
        data: folder of JSONL files; ``None`` reads the hub.
        limit: only the first rows; of each subject, where rows have subjects. ``None`` for all.
        fewshot: number of examples before each question.
        seed: of the choice of examples.

    Raises:
        UsageError: an unknown task, a limit below 1, fewer rows than examples.
        DataError: rows that are missing, unreadable or not as they should be; file, line, field and value are said.
    """
    _check_numbers(limit, fewshot)
    task, source, found, notes = _read(name, data)
    rows = [build_prompt(task, row, where) for where, row in found]
    _check_subjects(rows)
    if task.chance is None and task.hub is None and task.kind != "continuation":
        task = dataclasses.replace(task, chance=sum(1 / len(row.question.answers) for row in rows) / len(rows))
    before, used = _examples(task, rows, data, fewshot, seed)
    kept = _first_of_each(rows, limit)
    clusters = tuple(dict.fromkeys(row.subject for row in rows if row.subject is not None))
    questions = tuple(_question(task, rows[index], before[index], clusters) for index in kept)
    settings = _settings(task, limit if len(kept) < len(rows) else None, fewshot) | used
    return LoadedTask(task, questions, source, settings, clusters, (*notes, *_more_notes(task, rows, kept, clusters)))


def _check_numbers(limit: int | None, fewshot: int) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} rows leaves nothing to ask; it must be 1 or more.")
    if fewshot < 0:
        raise UsageError(f"{fewshot} examples cannot be shown; fewshot must be 0 or more.")


def _read(name: str, data: Path | None) -> tuple[Task, str, list[tuple[str, Row]], tuple[str, ...]]:
    """Task, source, rows, notes."""
    task = next((task for task in TASKS if name in (task.name, *task.aliases)), None)
    if data is None:
        if task is None or task.hub is None:
            raise _unknown(name, data)
        source, rows = hub_datasets.read_split(task.name, task.hub, task.hub.split)
        return task, source, rows, ()
    if task is None:
        if data.is_dir() and name not in custom_names(data):
            raise _unknown(name, data)
        return read_custom(name, data)
    settings = find_settings(name, data)
    if settings is not None:
        raise DataError(
            f"{settings} would change what {task.name!r} means, which is a task of the toolkit. Give the rows and this "
            "file a name of their own."
        )
    path = find_rows((task.name, *task.aliases), data)
    return task, str(path), read_rows(path), ()


def _unknown(name: str, data: Path | None) -> UsageError:
    error = unknown_name("task", name, known_tasks(data))
    where = "" if data is None else f" {data} has no rows under that name either."
    return UsageError(f"{error}{where}")


def _check_subjects(rows: Sequence[PromptedExample]) -> None:
    """Rows with and without a subject cannot be grouped."""
    without = next((row for row in rows if row.subject is None), None)
    if without is not None and any(row.subject is not None for row in rows):
        raise DataError(f"{without.where} has no field 'subject', but other rows have; give it to all or to none.")


def _examples(
    task: Task, rows: Sequence[PromptedExample], data: Path | None, count: int, seed: int
) -> tuple[list[str], dict[str, Any]]:
    """What stands before each question, and the settings that say so."""
    if count == 0:
        return [""] * len(rows), {}
    examples = _find_examples(task, data)
    chosen = "in order" if examples.first else f"drawn with seed {seed}"
    return prefixes(rows, examples, count, seed, task.name), {"examples": f"{examples.source}, {chosen}"}


def _find_examples(task: Task, data: Path | None) -> FewshotExamples:
    if data is not None:
        path = find_examples((task.name, *task.aliases), data)
        if path is not None:
            pool = tuple(build_prompt(task, row, where) for where, row in read_rows(path))
            return FewshotExamples(pool, path.name.endswith(".fewshot.jsonl"), path.name)
    elif task.hub is not None and task.hub.fewshot_split is not None:
        source, found = hub_datasets.read_split(task.name, task.hub, task.hub.fewshot_split)
        return FewshotExamples(
            tuple(build_prompt(task, row, where) for where, row in found), task.hub.fewshot_first, source
        )
    return FewshotExamples(None, False, "the scored rows")


def _first_of_each(rows: Sequence[PromptedExample], limit: int | None) -> list[int]:
    """Places of the first ``limit`` rows of each subject."""
    seen: dict[str | None, int] = {}
    kept = []
    for index, row in enumerate(rows):
        seen[row.subject] = seen.get(row.subject, 0) + 1
        if limit is None or seen[row.subject] <= limit:
            kept.append(index)
    return kept


def _question(task: Task, row: PromptedExample, before: str, clusters: Sequence[str]) -> Question:
    """The question behind its description and examples."""
    described = task.description and (row.subject is not None or "{subject}" not in task.description)
    start = fill(task.description, {"subject": (row.subject or "").replace("_", " ")}) if described else ""
    pairs = tuple((start + before + context, continuation) for context, continuation in row.question.pairs)
    cluster = 0 if row.subject is None else clusters.index(row.subject)
    return dataclasses.replace(row.question, pairs=pairs, cluster=cluster, where=row.where)


def _settings(task: Task, limit: int | None, fewshot: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"fewshot": fewshot, "limit": limit, "prompt": task.prompt, "delimiter": task.delimiter}
    more = {"answer_prefix": task.answer_prefix, "description": task.description}
    return settings | {name: value for name, value in more.items() if value}


def _more_notes(task: Task, rows: Sequence[PromptedExample], kept: Sequence[int], clusters: Sequence[str]) -> list[str]:
    notes = []
    if len(kept) < len(rows):
        which = f"rows of each of {len(clusters)} subjects" if clusters else "rows"
        notes.append(f"only the first {which}: {len(kept)} of {len(rows)}")
    if not clusters and "{subject}" in task.description:
        notes.append("the rows name no subject: asked without the line that names it, and taken for independent")
    return notes

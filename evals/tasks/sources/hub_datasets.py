"""Rows of tasks from the hub: reading a split, and one small function per data set that brings a row into our fields.

The functions make the strings that lm-evaluation-harness 0.4 makes from the same rows, oddities included, because a
prompt that is nearly the same gives a number that is nearly comparable. A function may fail in any way on a row that is
not what it expects; `read_split` says which row that was.
"""

from __future__ import annotations

import re
from typing import Any

from calib.checkpoint.hub import hub_access, no_hub
from calib.errors import DataError
from evals.tasks.types import HubSource, Row

__all__ = [
    "arc",
    "boolq",
    "copa",
    "hellaswag",
    "lambada",
    "mmlu",
    "openbookqa",
    "piqa",
    "read_split",
    "sciq",
    "winogrande",
]

_BRACKETS = re.compile(r"\[.*?\]")
_CONNECTORS = {"cause": "because", "effect": "therefore"}


def read_split(name: str, hub: HubSource, split: str) -> tuple[str, list[tuple[str, Row]]]:
    """All rows of a split, converted.

    Args:
        name: of the task, for messages.
        hub: where they are.
        split: which part.

    Returns:
        What to call the source, and ``(where, row)`` of each row.

    Raises:
        DataError: the data set cannot be read (no network, say), or a row has not the fields that it should have.
    """
    source = f"hub data set {hub.repo}" + (f" ({hub.config})" if hub.config else "") + f", split {split}"
    rows = []
    for number, row in enumerate(_load(name, hub, split), start=1):
        try:
            rows.append((f"{source}, row {number}", hub.convert(row)))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source}, row {number} is not as the task {name!r} expects ({type(error).__name__}: {error}); its "
                f"fields: {', '.join(map(str, row))}. Give the rows as {name}.jsonl in a folder (--data)."
            ) from error
    return source, rows


def _load(name: str, hub: HubSource, split: str) -> Any:
    import datasets  # imported here: it takes a second, and most runs read files

    with hub_access() as unreachable:
        try:
            return datasets.load_dataset(hub.repo, hub.config, split=split)
        except Exception as error:  # the library and what it reads through raise errors of many unrelated classes
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            why = f"{type(error).__name__}: {reason}" if unreachable is None else no_hub(unreachable, "it")
            raise DataError(
                f"cannot read the rows of {name!r} from the hub data set {hub.repo!r} ({why}). Without a network, put "
                f"them as {name}.jsonl into a folder and name it with --data."
            ) from error


def arc(row: Row) -> Row:
    """ARC: labels are A-D or 1-4."""
    gold = row["choices"]["label"].index(row["answerKey"])
    return {"query": f"Question: {row['question']}", "choices": row["choices"]["text"], "gold": gold}


def openbookqa(row: Row) -> Row:
    """OpenBookQA: the bare stem."""
    gold = row["choices"]["label"].index(row["answerKey"].lstrip())
    return {"query": row["question_stem"], "choices": row["choices"]["text"], "gold": gold}


def hellaswag(row: Row) -> Row:
    """HellaSwag: activity, context, endings, without the marks that WikiHow left in them."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _without_marks(context),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def piqa(row: Row) -> Row:
    """PIQA: two solutions of a goal."""
    return {"query": f"Question: {row['goal']}", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}


def winogrande(row: Row) -> Row:
    """WinoGrande: the sentence up to its gap, filled in either way, and the rest of it."""
    before, _, after = row["sentence"].partition("_")
    return {
        "context_options": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": {"1": 0, "2": 1}[row["answer"]],
    }


def boolq(row: Row) -> Row:
    """BoolQ: a passage and a question that is answered by no or yes."""
    query = f"{row['passage']}\nQuestion: {row['question']}?"
    return {"query": query, "choices": ["no", "yes"], "gold": row["label"]}


def copa(row: Row) -> Row:
    """COPA: the premise without its full stop, a connector, two continuations."""
    choices = [row["choice1"], row["choice2"]]
    return {
        "query": f"{row['premise'].strip()[:-1]} {_CONNECTORS[row['question']]}",
        "choices": [choice[0].lower() + choice[1:] for choice in choices],
        "gold": row["label"],
    }


def lambada(row: Row) -> Row:
    """LAMBADA: everything before the last space, and the last word."""
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": word}


def mmlu(row: Row) -> Row:
    """MMLU: four choices of a subject."""
    return {
        "query": row["question"],
        "choices": row["choices"],
        "gold": row["answer"],
        "subject": row["subject"],
    }


def sciq(row: Row) -> Row:
    """SciQ: a supporting text, which may be empty, and three distractors before the answer."""
    return {
        "query": f"{row['support'].lstrip()}\nQuestion: {row['question']}",
        "choices": [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]],
        "gold": 3,
    }

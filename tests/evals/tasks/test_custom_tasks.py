"""Tasks that the table does not know: a file of rows, and settings beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calib.errors import DataError
from evals.tasks.registry import known_tasks, load_task
from tests.evals.tasks.rows import numbered, write

# Tasks of one's own


def test_a_file_that_the_table_does_not_know_is_a_task(tmp_path: Path) -> None:
    write(tmp_path, "quiz.part1.jsonl", [*numbered(2), {"query": "q", "choices": ["x", "y", "z", "w"], "gold": 3}])
    write(tmp_path / "tasks", "cloze.jsonl", [{"context": "one two", "continuation": "three"}])
    write(tmp_path, "quiz.train.jsonl", numbered(2))
    assert known_tasks(tmp_path)[-2:] == ("cloze", "quiz")
    quiz = load_task("quiz", data=tmp_path)
    assert quiz.questions[0].pairs == (("Question: 0", " a0"), ("Question: 0", " b0"))
    assert quiz.task.chance == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert "the query, a space, the choice" in quiz.notes[0]
    cloze = load_task("cloze", data=tmp_path)
    assert cloze.questions[0].pairs == (("one two", " three"),)
    assert (cloze.task.metric, cloze.task.chance) == ("acc", None)


def test_settings_beside_the_rows_say_how_to_ask(tmp_path: Path) -> None:
    write(tmp_path, "quiz.jsonl", numbered(2, subject="law_and_order"))
    settings = {
        "prompt": "{query}\n{choices}\n=>",
        "delimiter": "",
        "metric": "acc_norm",
        "chance": 0.4,
        "description": "About {subject}: ",
    }
    (tmp_path / "quiz.task.json").write_text(json.dumps(settings))
    loaded = load_task("quiz", data=tmp_path)
    assert loaded.questions[1].pairs[0] == ("About law and order: Question: 1\nA. a1\nB. b1\n=>", "A")
    assert (loaded.task.metric, loaded.task.chance, loaded.notes) == ("acc_norm", 0.4, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"promt": "{query}"}, "unknown field 'promt'. Did you mean 'prompt'"),
        ({"prompt": "Answer:"}, "'Answer:' must hold {query}"),
        ({"prompt": 3}, "'prompt' is '3', but it must be a string"),
        ({"metric": "acc_nrm"}, "unknown metric 'acc_nrm'. Did you mean 'acc_norm'"),
        ({"chance": True}, "'chance' is 'True', but it must be a number from 0 to 1"),
        ({"chance": 25}, "'chance' is '25'"),
        ([], "is not a JSON object"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, "quiz.jsonl", numbered(1))
    (tmp_path / "quiz.task.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=message) as caught:
        load_task("quiz", data=tmp_path)
    assert "quiz.task.json" in str(caught.value)


def test_settings_for_a_task_of_the_table_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "piqa.jsonl", numbered(1))
    (tmp_path / "piqa.task.json").write_text("{}")
    with pytest.raises(DataError, match="would change what 'piqa' means"):
        load_task("piqa", data=tmp_path)

"""Questions of every task: the exact strings, from hub rows and from files; examples; limits; tasks of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import DataError, UsageError
from evals.tasks.metrics import METRICS
from evals.tasks.prompts import fill
from evals.tasks.registry import TASKS, known_tasks, load_task
from evals.tasks.types import Task
from tests.evals.tasks.rows import HUB_ROWS, numbered, write

HUB_ROWS["arc_challenge"] = HUB_ROWS["arc_easy"]
MMLU_PROMPT = (
    "The following are multiple choice questions (with answers) about high school biology.\n\n"
    "What is {choices}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
)
ASKED: dict[str, tuple[list[tuple[str, str]], int]] = {
    "arc_easy": (
        [("Question: Why is the sky blue?\nAnswer:", f" {text}") for text in ("paint", "scattering", "water")],
        1,
    ),
    "hellaswag": (
        [("Baking: A man stirs. Then he", f" {text}") for text in ("waits. Long", "sleeps.", "x y")],
        2,
    ),
    "piqa": ([("Question: boil water\nAnswer:", " use heat"), ("Question: boil water\nAnswer:", " use ice")], 0),
    "winogrande": (
        [("Ann saw Bea because Ann", " waved at her ."), ("Ann saw Bea because Bea", " waved at her .")],
        1,
    ),
    "boolq": ([("Cats sleep.\nQuestion: do cats sleep?\nAnswer:", f" {text}") for text in ("no", "yes")], 1),
    "openbookqa": ([("Ice is", " hot"), ("Ice is", " cold")], 1),
    "copa": ([("The vase fell therefore", "  it broke."), ("The vase fell therefore", "  i sang.")], 0),
    "lambada_openai": ([("She opened the  old", " door")], 0),
    "mmlu": ([(MMLU_PROMPT, f" {letter}") for letter in "ABCD"], 3),
    "sciq": (
        [("Stars shine.\nQuestion: What shines?\nAnswer:", f" {text}") for text in ("mud", "wood", "coal", "stars")],
        3,
    ),
}
ASKED["arc_challenge"] = ASKED["arc_easy"]


def test_the_table_has_the_tasks_that_are_promised() -> None:
    promised = ["arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "openbookqa", "copa"]
    promised += ["lambada_openai", "mmlu", "sciq"]
    assert list(known_tasks()) == promised
    assert set(HUB_ROWS) == set(ASKED) == set(promised)
    names = [name for task in TASKS for name in (task.name, *task.aliases)]
    assert len(names) == len(set(names))
    assert all(task.metric in METRICS for task in TASKS)
    assert {task.name: task.kind for task in TASKS if task.kind != "choices"} == {
        "winogrande": "partial_context",
        "lambada_openai": "continuation",
    }


@pytest.mark.parametrize("name", list(ASKED))
def test_a_hub_row_gives_exactly_these_strings(name: str, hub: Callable[..., Any]) -> None:
    task = next(task for task in TASKS if task.name == name)
    assert task.hub is not None
    calls = hub({task.hub.split: [HUB_ROWS[name]]})
    loaded = load_task(name)
    assert calls == [(task.hub.repo, task.hub.config, task.hub.split)]
    pairs, gold = ASKED[name]
    (question,) = loaded.questions
    assert (list(question.pairs), question.gold) == (pairs, gold)
    assert loaded.task is task
    assert task.hub.repo in loaded.source
    assert loaded.notes == ()


def test_the_length_of_an_answer_is_that_of_the_harness(hub: Callable[..., Any]) -> None:
    """Without the delimiter; COPA's begin with a space; WinoGrande's are the contexts; MMLU's the letters."""
    expected = {
        "piqa": ("use heat", "use ice"),
        "copa": (" it broke.", " i sang."),
        "winogrande": ("Ann saw Bea because Ann", "Ann saw Bea because Bea"),
        "mmlu": ("A", "B", "C", "D"),
    }
    for name, answers in expected.items():
        hub({split: [HUB_ROWS[name]] for split in ("test", "validation")})
        assert load_task(name).questions[0].answers == answers


def test_local_rows_lose_one_line_feed_and_keep_everything_else(tmp_path: Path) -> None:
    rows = [{"query": "Question: wall \n\n", "choices": ["é", "é"], "gold": 1}]
    write(tmp_path / "tasks", "piqa.jsonl", rows)
    (question,) = load_task("piqa", data=tmp_path).questions
    assert question.pairs == (("Question: wall \n\nAnswer:", " é"),) * 2  # equal choices are allowed


def test_subjects_are_clusters_with_a_description_each(tmp_path: Path) -> None:
    rows = numbered(3, subject="anatomy") + numbered(2, subject="world_religions")
    write(tmp_path, "mmlu.jsonl", rows)
    loaded = load_task("mmlu", data=tmp_path, limit=1)
    assert loaded.clusters == ("anatomy", "world_religions")
    assert [question.cluster for question in loaded.questions] == [0, 1]
    assert loaded.questions[1].pairs[0][0] == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "Question: 0\nA. a0\nB. b0\nAnswer:"
    )
    assert loaded.notes == ("only the first rows of each of 2 subjects: 2 of 5",)


def test_lettered_rows_without_subject_are_asked_without_its_line(tmp_path: Path) -> None:
    write(tmp_path, "mmlu.jsonl", numbered(2))
    loaded = load_task("mmlu", data=tmp_path)
    assert loaded.questions[0].pairs[1] == ("Question: 0\nA. a0\nB. b0\nAnswer:", " B")
    assert loaded.clusters == ()
    assert "name no subject" in loaded.notes[0]


def test_a_subject_in_some_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "mmlu.jsonl", [*numbered(1, subject="anatomy"), *numbered(1)])
    with pytest.raises(DataError, match=f"{path}, line 2 has no field 'subject'"):
        load_task("mmlu", data=tmp_path)


def test_settings_say_what_decides_and_nothing_of_the_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "arc_easy.jsonl", numbered(4))
    one, other = (load_task("arc_easy", data=tmp_path / folder, fewshot=2) for folder in ("a", "b"))
    assert one.settings == other.settings
    assert json.loads(json.dumps(one.settings)) == one.settings
    assert load_task("arc_easy", data=tmp_path / "a", limit=4).settings["limit"] is None  # all rows
    assert load_task("arc_easy", data=tmp_path / "a", limit=3).settings["limit"] == 3


# Names, limits, the hub


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path) -> None:
    write(tmp_path, "my_quiz.jsonl", numbered(1))
    with pytest.raises(UsageError, match=r"unknown task 'arc_esy'\. Did you mean 'arc_easy'"):
        load_task("arc_esy")
    with pytest.raises(UsageError, match="Did you mean 'my_quiz'"):
        load_task("my_quizz", data=tmp_path)
    for name in ("../my_quiz", "my_quiz*", "", "/etc/passwd"):
        with pytest.raises(UsageError, match="unknown task"):
            load_task(name, data=tmp_path)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int, tmp_path: Path) -> None:
    write(tmp_path, "piqa.jsonl", numbered(1))
    with pytest.raises(UsageError, match=f"limit of {limit} rows"):
        load_task("piqa", data=tmp_path, limit=limit)


def test_without_a_network_the_error_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"cannot read the rows of 'sciq' .* put them as sciq.jsonl into a folder"):
        load_task("sciq")


def test_a_hub_row_of_another_shape_is_named(hub: Callable[..., Any]) -> None:
    hub({"test": [HUB_ROWS["sciq"], {"prompt": "?"}]})
    with pytest.raises(DataError, match=r"allenai/sciq, split test, row 2 .*KeyError: 'support'.*fields: prompt"):
        load_task("sciq")


@given(st.text(), st.text(), st.text())
def test_filling_a_template_never_fills_what_it_put_in(query: str, choices: str, subject: str) -> None:
    fields = {"query": query, "choices": choices, "subject": subject}
    assert fill("<{query}|{choices}|{subject}|{other}>", fields) == "<" + "|".join(
        (query, choices, subject, "{other}>")
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.name))
def test_the_page_of_tasks_shows_what_the_table_says(task: Task) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| `{task.name}` |"))
    _, _, rows, prompt, metric, chance, _ = (cell.strip() for cell in line.split("|"))
    assert task.hub is not None
    config = f" (`{task.hub.config}`)" if task.hub.config else ""
    assert rows == f"`{task.hub.repo}`{config}, {task.hub.split}"
    assert prompt == "`" + task.prompt.replace("\n", "\\n") + "`"
    assert metric == f"`{task.metric}`"
    assert chance == ("" if task.chance is None else str(task.chance))
    assert all(f"`{alias}`" in page for alias in task.aliases)

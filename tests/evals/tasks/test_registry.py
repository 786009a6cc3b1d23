"""Questions of every task: the exact strings, from hub rows and from files; examples; limits; tasks of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import DataError, UsageError
from evals.tasks.metrics import METRICS
from evals.tasks.prompts import fill
from evals.tasks.registry import TASKS, known_tasks, load_task
from evals.tasks.types import Task

HUB_ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "Why is the sky blue?",
        "choices": {"text": ["paint", "scattering", "water"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man [step] stirs.",
        "ctx_b": "then He",
        "endings": ["waits [title] Long", " sleeps.", "x  y"],
        "label": "2",
    },
    "piqa": {"goal": "boil water", "sol1": "use heat", "sol2": "use ice", "label": 0},
    "winogrande": {
        "sentence": "Ann saw Bea because _ waved at her .",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "2",
    },
    "boolq": {"passage": "Cats sleep.", "question": "do cats sleep", "label": 1},
    "openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "copa": {
        "premise": "The vase fell. ",
        "choice1": "It broke.",
        "choice2": "I sang.",
        "question": "effect",
        "label": 0,
    },
    "lambada_openai": {"text": "She opened the  old door"},
    "mmlu": {
        "question": " What is {choices}? ",
        "choices": ["w", "x", "y", "z"],
        "answer": 3,
        "subject": "high_school_biology",
    },
    "sciq": {
        "support": "\n Stars shine.",
        "question": "What shines?",
        "distractor1": "mud",
        "distractor2": "wood",
        "distractor3": "coal",
        "correct_answer": "stars",
    },
}
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[dict[str, Any]]]], list[tuple[Any, ...]]]:
    """A function that puts splits on a hub of our own, and returns the list of what is asked of it."""

    def put(splits: dict[str, list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load(path: str, name: str | None = None, *, split: str) -> list[dict[str, Any]]:
            calls.append((path, name, split))
            return splits[split]

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return put


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"query": f"Question: {i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2, **more} for i in range(count)]


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


# Examples


def test_examples_from_the_scored_rows_never_show_the_asked_one(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy.jsonl", numbered(12))
    plain = load_task("arc_easy", data=tmp_path).questions
    loaded = load_task("arc_easy", data=tmp_path, fewshot=3, seed=1)
    solved = {"".join(question.pairs[question.gold]): number for number, question in enumerate(plain)}
    shown = []
    for number, (question, bare) in enumerate(zip(loaded.questions, plain, strict=True)):
        context, continuation = question.pairs[0]
        *examples, last = context.split("\n\n")
        assert (last, continuation) == bare.pairs[0]
        assert question.answers == bare.answers
        numbers = [solved[example] for example in examples]
        assert len(set(numbers)) == 3
        assert number not in numbers
        shown.append(tuple(numbers))
    assert len(set(shown)) <= 4  # the fixed set, and one for each of its members
    assert len({number for numbers in shown for number in numbers}) == 4


def test_the_seed_and_only_the_seed_decides_the_examples(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy.jsonl", numbered(40))
    load = lambda **more: load_task("arc_easy", data=tmp_path, fewshot=3, **more)  # noqa: E731
    assert load().questions == load().questions
    assert load().questions[:5] == load(limit=5).questions
    assert load(seed=1).questions != load(seed=2).questions
    assert load(seed=1).settings != load(seed=2).settings


def test_examples_from_a_file_come_in_order_or_drawn(tmp_path: Path) -> None:
    write(tmp_path, "piqa.jsonl", numbered(2))
    others = [{"query": f"Question: e{i}\n", "choices": ["no", "yes"], "gold": 1} for i in range(9)]
    train = write(tmp_path, "piqa.train.jsonl", others)
    context = load_task("piqa", data=tmp_path, fewshot=2).questions[0].pairs[0][0]
    first, second, last = context.split("\n\n")
    assert {first, second} < {f"Question: e{i}\nAnswer: yes" for i in range(9)}
    assert last == "Question: 0\nAnswer:"
    train.rename(tmp_path / "piqa.fewshot.jsonl")
    loaded = load_task("piqa", data=tmp_path, fewshot=2)
    assert loaded.questions[1].pairs[0][0] == (
        "Question: e0\nAnswer: yes\n\nQuestion: e1\nAnswer: yes\n\nQuestion: 1\nAnswer:"
    )
    assert loaded.settings["examples"] == "piqa.fewshot.jsonl, in order"


def test_examples_of_mmlu_are_the_first_of_the_subject_on_the_hub(hub: Callable[..., Any]) -> None:
    def row(subject: str, number: int) -> dict[str, Any]:
        return HUB_ROWS["mmlu"] | {"subject": subject, "question": f"{subject} {number}"}

    dev = [row(subject, number) for number in range(2) for subject in ("law", "art")]
    hub({"test": [row("art", 8), row("law", 9)], "dev": dev})
    loaded = load_task("mmlu", fewshot=2)
    context = loaded.questions[1].pairs[0][0]
    blocks = context.split("\n\n")
    assert blocks[0] == "The following are multiple choice questions (with answers) about law."
    assert [block.split("\n")[0] for block in blocks[1:]] == ["law 0", "law 1", "law 9"]
    assert blocks[1].endswith("\nAnswer: D")
    assert context.count("The following") == 1


@pytest.mark.parametrize("name", ["winogrande", "lambada_openai"])
def test_examples_of_the_other_kinds_are_whole_sentences(name: str, tmp_path: Path) -> None:
    rows = {
        "winogrande": [{"context_options": [f"x{i}", f"y{i}"], "continuation": "ran.", "gold": 1} for i in range(3)],
        "lambada_openai": [{"context": f"y{i}", "continuation": "ran."} for i in range(3)],
    }
    write(tmp_path, f"{name}.jsonl", rows[name])
    for question in load_task(name, data=tmp_path, fewshot=2).questions:
        context, continuation = question.pairs[-1]
        first, second, last = context.split("\n\n")
        assert {f"{last} ran.", first, second} == {"y0 ran.", "y1 ran.", "y2 ran."}
        assert continuation == " ran."


@pytest.mark.parametrize(
    ("files", "fewshot", "message"),
    [
        ({"piqa.jsonl": 3}, 3, "3 examples are asked for, but there are 2 rows in the scored rows besides"),
        (
            {"piqa.jsonl": 3, "piqa.train.jsonl": 4},
            5,
            "5 examples .* there are 4 rows in piqa.train.jsonl; ask for fewer",
        ),
        ({"piqa.jsonl": 3}, -1, "-1 examples"),
    ],
)
def test_more_examples_than_rows_are_refused(files: dict[str, int], fewshot: int, message: str, tmp_path: Path) -> None:
    for name, count in files.items():
        write(tmp_path, name, numbered(count))
    with pytest.raises(UsageError, match=message):
        load_task("piqa", data=tmp_path, fewshot=fewshot)


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

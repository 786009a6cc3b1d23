"""Examples in front of questions: which rows, in which order, and never the scored one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.errors import UsageError
from evals.tasks.registry import load_task
from tests.evals.tasks.rows import HUB_ROWS, numbered, write

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

"""Files of rows: which one is taken, and what is said about lines that do not serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.errors import DataError
from evals.tasks.prompts import build_prompt
from evals.tasks.registry import TASKS, load_task
from evals.tasks.sources.local_files import custom_names, find_examples, find_rows, read_rows

CHOICE = {"query": "Question: x", "choices": ["a", "b"], "gold": 0}
PARTIAL = {"context_options": ["x", "y"], "continuation": "z", "gold": 1}
CLOZE = {"context": "x", "continuation": "y"}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CHOICE) + "\n")


@pytest.mark.parametrize(
    ("present", "found"),
    [
        (["openbookqa.jsonl", "openbook_qa.jsonl"], "openbookqa.jsonl"),
        (["tasks/openbookqa.jsonl", "openbook_qa.jsonl"], "tasks/openbookqa.jsonl"),
        (["openbookqa.first300.jsonl", "openbook_qa.jsonl"], "openbook_qa.jsonl"),
        (["tasks/openbook_qa.first300.jsonl"], "tasks/openbook_qa.first300.jsonl"),
        (["openbookqa.part.jsonl", "openbookqa.train.jsonl", "openbookqa.fewshot.jsonl"], "openbookqa.part.jsonl"),
        (["openbookqa.jsonl", "tasks/openbookqa.jsonl"], "openbookqa.jsonl"),
    ],
)
def test_the_exact_name_comes_first_then_a_part(present: list[str], found: str, tmp_path: Path) -> None:
    touch(tmp_path, *present, "openbookqa2.jsonl")
    assert find_rows(("openbookqa", "openbook_qa"), tmp_path) == tmp_path / found


def test_several_parts_are_refused_with_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "piqa.one.jsonl", "tasks/piqa.two.jsonl")
    with pytest.raises(DataError, match=r"several files .* 'piqa': .*piqa.one.jsonl, .*tasks/piqa.two.jsonl. Name"):
        find_rows(("piqa",), tmp_path)


def test_a_missing_file_is_told_with_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "piqa.jsonl", "tasks/copa.jsonl", "boolq.train.jsonl")
    with pytest.raises(DataError) as caught:
        find_rows(("boolq", "bool_q"), tmp_path)
    message = str(caught.value)
    assert "looked for boolq.jsonl or boolq.*.jsonl or bool_q.jsonl or bool_q.*.jsonl, also in tasks/" in message
    assert "There is: boolq.train.jsonl, piqa.jsonl, tasks/copa.jsonl." in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"There is no \.jsonl file"):
        find_rows(("boolq",), tmp_path / "empty")
    with pytest.raises(DataError, match="there is no folder"):
        find_rows(("boolq",), tmp_path / "nowhere")


def test_a_long_folder_is_not_listed_whole(tmp_path: Path) -> None:
    touch(tmp_path, *(f"t{i:02}.jsonl" for i in range(30)))
    with pytest.raises(DataError, match=r"t11\.jsonl and 18 more"):
        find_rows(("piqa",), tmp_path)


def test_examples_and_names(tmp_path: Path) -> None:
    touch(tmp_path, "piqa.train.jsonl", "quiz.a.jsonl", "quiz.b.jsonl", "tasks/other.jsonl", ".jsonl")
    assert find_examples(("piqa",), tmp_path) == tmp_path / "piqa.train.jsonl"
    touch(tmp_path, "tasks/piqa.fewshot.jsonl")
    assert find_examples(("piqa",), tmp_path) == tmp_path / "tasks/piqa.fewshot.jsonl"
    assert find_examples(("quiz",), tmp_path) is None
    assert custom_names(tmp_path) == ("other", "quiz")


def test_lines_end_at_line_feeds_only_and_empty_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"query": "a\u2028b\x85c\n", "choices": ["x"]}
    path.write_bytes(b"\xef\xbb\xbf" + f"\n{json.dumps(row, ensure_ascii=False)}\r\n\n".encode())
    assert read_rows(path) == [(f"{path}, line 2", {"query": "a\u2028b\x85c", "choices": ["x"]})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b"{}\n{\n", "line 2 is not JSON"),
        (b"[1]\n", r"line 1 is not a JSON object: '\[1\]'"),
        (b'{"query": "\xff"}\n', "is not UTF-8 text: byte 11 is 0xff"),
        (b"[" * 100_000, "line 1 is nested too deep"),
        (b'{}\n{"query": "cut \\ud83d"}\n', r"line 2: the field 'query' has half of a surrogate pair \(\\ud83d\)"),
        (b'{"choices": ["a", {"b": "\\udc00"}]}\n', r"line 1: the field 'choices' has half of a surrogate pair"),
    ],
)
def test_files_that_are_not_rows_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "piqa.jsonl")
    (tmp_path / "piqa.jsonl").chmod(0)
    with pytest.raises(DataError, match="cannot read"):
        load_task("piqa", data=tmp_path)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("piqa", {"query": "x", "gold": 0}, "has no field 'choices'; its fields: 'query', 'gold'"),
    ("piqa", CHOICE | {"query": 3}, "'query' is '3', but it must be a string"),
    ("piqa", CHOICE | {"query": " "}, "'query' is ' ', but it must be a text that is not empty"),
    ("piqa", CHOICE | {"choices": "ab"}, "'choices' is 'ab', but it must be a list of strings"),
    ("piqa", CHOICE | {"choices": ["a", 2]}, "but it must be a list of strings"),
    ("piqa", CHOICE | {"choices": []}, "but it must be a list of two or more, not of 0"),
    ("piqa", CHOICE | {"choices": ["a"]}, "but it must be a list of two or more, not of 1"),
    ("piqa", CHOICE | {"choices": ["a", ""]}, "but it must be a list without empty texts"),
    ("piqa", CHOICE | {"gold": 2}, "'gold' is '2', but it must be from 0 to 1, because there are 2 answers"),
    ("piqa", CHOICE | {"gold": -1}, "'gold' is '-1', but it must be from 0 to 1"),
    ("piqa", CHOICE | {"gold": True}, "'gold' is 'True', but it must be a whole number from 0 to 1"),
    ("piqa", CHOICE | {"gold": "0"}, "'gold' is '0', but it must be a whole number"),
    ("piqa", CHOICE | {"gold": 0.0}, "'gold' is '0.0', but it must be a whole number"),
    ("piqa", CHOICE | {"gold": None}, "'gold' is 'None', but it must be a whole number"),
    ("piqa", CHOICE | {"subject": 3}, "'subject' is '3'"),
    ("mmlu", CHOICE | {"choices": ["x"] * 27}, "27 choices are more than there are letters"),
    ("winogrande", CHOICE, "has no field 'context_options'; .* have context_options, continuation, gold"),
    ("winogrande", PARTIAL | {"continuation": ""}, "'continuation' is ''"),
    ("winogrande", PARTIAL | {"gold": 2}, "'gold' is '2'"),
    ("lambada_openai", {"context": "x"}, "has no field 'continuation'"),
    ("lambada_openai", CLOZE | {"continuation": " "}, "'continuation' is ' '"),
    ("own", {"question": "x"}, r"is not a row of a task: it has 'question'. Expected are query, choices, gold; or"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_rows_that_do_not_serve_are_named(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.jsonl"
    good = {"winogrande": PARTIAL, "lambada_openai": CLOZE, "own": row}.get(name, CHOICE)
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=message) as caught:
        load_task(name, data=tmp_path)
    assert f"{path}, line {1 if name == 'own' else 2}" in str(caught.value)


def test_empty_choices_of_a_lettered_task_and_empty_contexts_serve(tmp_path: Path) -> None:
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(CHOICE | {"choices": ["", "b"]}))
    assert load_task("mmlu", data=tmp_path).questions[0].pairs[0] == ("Question: x\nA. \nB. b\nAnswer:", " A")
    (tmp_path / "lambada_openai.jsonl").write_text(json.dumps(CLOZE | {"context": ""}))
    assert load_task("lambada_openai", data=tmp_path).questions[0].pairs == (("", " y"),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = ("query", "choices", "gold", "context_options", "continuation", "context", "subject")


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a machine with other work
@given(st.sampled_from(TASKS), st.dictionaries(st.sampled_from(FIELD_NAMES), JSON))
def test_any_row_is_a_question_or_a_data_error(task: Any, row: dict[str, Any]) -> None:
    try:
        question = build_prompt(task, row, "here").question
    except DataError:
        return
    assert 0 <= question.gold < len(question.answers) == len(question.pairs)
    assert all(continuation.strip() for _, continuation in question.pairs)

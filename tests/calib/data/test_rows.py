"""Rows of files -> text: arrays, lines, parquet, conversations; what does not serve is named with file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from calib.data.chat import RowReader
from calib.data.sources import Text, read_text
from calib.data.tokens import load_calibration
from calib.errors import DataError, UsageError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello é"}]
WRITTEN = "<s><user>Hi</s><assistant>Hello é</s>"
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return made


@pytest.fixture(scope="module")
def chatty(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def read(source: str, tokenizer: Any = None, template: str = "auto") -> Text:
    return read_text(source, rows=RowReader(template, lambda: tokenizer))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSON"])
@pytest.mark.parametrize("form", ["array", "pretty array", "lines"])
def test_an_array_and_lines_are_the_same_rows(write: Write, name: str, form: str) -> None:
    rows = [{"text": 'one "é"\n'}, {"text": "two", "id": 3}]
    content = lines(*rows) if form == "lines" else json.dumps(rows, indent=1 if form == "pretty array" else None)
    assert read(write(name, content)).text == 'one "é"\n\n\ntwo'
    assert not read(write(name, content)).templated


def test_strings_and_a_single_object(write: Write) -> None:
    assert read(write("a.json", '["one", "two"]')).text == "one\n\ntwo"
    assert read(write("a.jsonl", '"one"\n"two"\n')).text == "one\n\ntwo"
    assert read(write("a.json", '{\n "text": "one"\n}')).text == "one"
    assert read(write("a.json", '[{"body": "one"}]') + ":body").text == "one"
    assert read(write("a.json", '[{"text": "0123456789"}]') + "@0.2:0.5").text == "234"


def test_parquet_is_read_through_datasets(tmp_path: Path, chatty: Any) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["x", "y"]}).to_parquet(str(path))
    assert read(str(path)).text == "one\n\ntwo"
    assert read(f"{path}:body").text == "x\n\ny"
    datasets.Dataset.from_dict({"messages": [CHAT, CHAT]}).to_parquet(str(path))
    assert read(str(path), chatty).text == WRITTEN * 2
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet as parquet \("):
        read(str(path))


@pytest.mark.parametrize(
    ("name", "content", "place", "told"),
    [
        (
            "a.json",
            '[{"text": "a"}, {"body": "x", "id": 1}]',
            "row 2",
            "no text field 'text'; its fields: 'body', 'id'",
        ),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "x"}', "line 3", r"name another column: .*a\.jsonl:COLUMN\."),
        ("a.json", '[{"text": null}]', "row 1", "no text field 'text'"),
        ("a.json", "[1]", "row 1", "neither an object of columns nor a text: '1'"),
        ("a.json", '[{"text": "a"},', "", "is not JSON: Expecting value"),
        (
            "a.json",
            "plain words",
            "line 1",
            r"is not JSON: .* The suffix \.json promises rows; give plain text as a \.txt",
        ),
        ("a.jsonl", '{"text": "a"}\n{"te', "line 2", "is not JSON"),
        ("a.json", "[]", "", "has no rows"),
        ("a.jsonl", "\n", "", "has no rows"),
        ("a.json", '{"messages": ["x"]}', "row 1", r"messages\[0\] is not a message but 'x'"),
        (
            "a.json",
            '{"messages": [{"role": "user"}]}',
            "row 1",
            r"messages\[0\] has no role and text content .*: 'role'",
        ),
        ("a.json", '{"messages": []}', "row 1", "no text field 'text'; its fields: 'messages'"),
        ("a.json", "[" * 100_000, "", "nested too deep"),
    ],
)
def test_rows_that_do_not_serve_are_named(write: Write, name: str, content: str, place: str, told: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match=f"{name}.*{place}.*{told}"):
        read(path)
    with pytest.raises(DataError, match="no text field 'words'; its fields: 'text'"):
        read(write("b.json", '[{"text": "a"}]') + ":words")


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"id": 1, "conversations": CHAT}])
def test_conversations_go_through_the_template(write: Write, chatty: Any, row: dict[str, Any]) -> None:
    found = read(write("a.jsonl", lines(row, row)), chatty)
    assert found.text == WRITTEN * 2
    assert found.templated
    assert found.notes == ("2 conversations, written by the model's chat template",)
    plain = read(write("a.jsonl", lines(row)), chatty, "never")
    assert (plain.text, plain.templated) == ("Hi\n\nHello é", False)


def test_contents_in_parts(write: Write, chatty: Any) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert read(write("a.json", lines({"messages": [{"role": "user", "content": parts}]})), chatty).text == (
        "<s><user>Hi there</s>"
    )
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(DataError, match=r"a\.json, row 1: messages\[0\] has no role and text content"):
        read(write("a.json", lines({"messages": image})), chatty)


def test_what_a_template_choice_decides(write: Write, chatty: Any) -> None:
    both = write("a.json", lines({"text": "plain", "messages": CHAT}))
    assert read(both, chatty).text == "plain"
    assert read(both, chatty, "always").text == WRITTEN
    with pytest.raises(UsageError, match=r"a\.json, row 1 is a text, and --calib-template always"):
        read(write("a.json", '["one"]'), chatty, "always")
    for source in (write("a.txt", "one"), "pydoc"):
        with pytest.raises(UsageError, match="a text without rows, and --calib-template always"):
            read(source, chatty, "always")


def test_a_template_that_is_missing_or_refuses(write: Write, chatty: Any, tiny_tokenizer: Any) -> None:
    chat = write("a.jsonl", lines({"messages": CHAT}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is a conversation, but .* has no chat template .* never"):
        read(chat, tiny_tokenizer)
    with pytest.raises(DataError, match="has no chat template"):
        read_text(chat)
    system = write("a.jsonl", lines({"messages": [{"role": "system", "content": "x"}]}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the model's chat template refuses .*\(no system here\)"):
        read(system, chatty)


def test_the_template_brings_its_special_tokens(write: Write, chatty: Any) -> None:
    path = write("a.jsonl", lines(*[{"messages": CHAT}] * 40))
    found = load_calibration(path, chatty, samples=2, seqlen=16, seed=0, bos="always")
    ids = chatty(WRITTEN, add_special_tokens=False)["input_ids"]
    assert ids[0] == chatty.bos_token_id
    assert found.text_tokens == 40 * len(ids)
    assert (found.tokens[:, 0] == chatty.bos_token_id).all()
    with pytest.raises(UsageError, match="unknown choice for --calib-template 'yes'"):
        load_calibration(path, chatty, samples=2, seqlen=16, seed=0, template="yes")
    with pytest.raises(UsageError, match="--calib-template never has no effect on 'self'"):
        load_calibration("self", chatty, samples=2, seqlen=16, seed=0, template="never")


def test_hub_rows_of_messages(monkeypatch: pytest.MonkeyPatch, chatty: Any) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: [{"messages": CHAT}] * 3)
    assert read("me/chats:train:messages", chatty).text == WRITTEN * 3


@pytest.mark.parametrize("content", ['{"text": "cut \\ud83d here"}', '["cut \\ud83d here"]'])
def test_half_a_surrogate_pair_is_named(write: Write, content: str) -> None:
    with pytest.raises(
        DataError, match=r"a\.json, row 1: .*'text' has half of a surrogate pair \(\\ud83d\) at charac.* 4"
    ):
        read(write("a.json", content))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: .*'messages' has half of a surrogate pair \(\\udc00\)"):
        read(write("a.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}'))


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_of_characters_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    assert read(str(path)).text == "\n\n".join(texts)


def test_a_call_of_a_tool_is_a_message_without_content(write: Write, chatty: PreTrainedTokenizerFast) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    source = write("calls.jsonl", lines({"messages": [CHAT[0], call]}))
    assert read(source, chatty).text == "<s><user>Hi</s><assistant></s>"
    empty = write("empty.jsonl", lines({"messages": [CHAT[0], {"role": "assistant", "content": None}]}))
    with pytest.raises(DataError, match=r"messages\[1\] has no role and text content"):
        read(empty, chatty)

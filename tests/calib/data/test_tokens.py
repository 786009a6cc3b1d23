"""Sources, the draw, and what a fingerprint depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from calib.data.sources import read_text
from calib.data.tokens import Calibration, load_calibration, tokenize, tokenizer_hash
from calib.errors import DataError, UsageError

WORDS = " ".join(f"word{i}" for i in range(400))


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return str(path)


def load(source: str, tokenizer: Any, **changes: Any) -> Calibration:
    return load_calibration(source, tokenizer, **({"samples": 4, "seqlen": 16, "seed": 0} | changes))


class Rows(list[dict[str, Any]]):
    """What `datasets.load_dataset` returns, as far as it is used."""


def test_a_file_is_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028three é".encode())
    found = read_text(str(path))
    assert found.text == "one\r\ntwo\u2028three é"
    assert found.sha256 == hashlib.sha256("one\r\ntwo\u2028three é".encode()).hexdigest()


def test_jsonl_documents_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\u2028", "id": 3}\n', encoding="utf-8")
    assert read_text(str(path)).text == "one\n\ntwo\u2028"


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "a"}', '{"text": 1}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        read_text(str(path))


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 ")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text: byte 3 is 0xe9"):
        read_text(str(path))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file 'nowhere\.txt' \(looked in "):
        read_text("nowhere.txt")
    with pytest.raises(DataError, match=r"no file .*repo:split:field"):
        read_text("owner/name")
    with pytest.raises(DataError, match="is a folder; give one file"):
        read_text(str(tmp_path))


def test_unknown_names_offer_near_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown text source 'wikitxt2'\. Did you mean 'wikitext2'"):
        read_text("wikitxt2")
    with pytest.raises(UsageError, match="unknown text source 'c4:tset'"):
        read_text("c4:tset")


def test_slices_are_of_characters_and_compose(words: str) -> None:
    count = len(WORDS)
    cut = round(0.8 * count)
    assert read_text(f"{words}@0:0.8").text + read_text(f"{words}@0.8:1").text == WORDS
    assert read_text(f"{words}@0:0.8", split=(0.5, 1.0)).text == WORDS[:cut][round(0.5 * cut) :]
    assert read_text(words, split=(0.25, 0.5)).text == WORDS[round(0.25 * count) : round(0.5 * count)]


def test_a_file_whose_name_looks_like_a_slice_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a@0:1"
    path.write_text("whole", encoding="utf-8")
    assert read_text(str(path)).text == "whole"


@pytest.mark.parametrize("part", ["0.8:0.2", "0:1.5", "0.5:0.5"])
def test_wrong_parts_are_refused(words: str, part: str) -> None:
    with pytest.raises(UsageError, match="must satisfy 0 <= start < end <= 1"):
        read_text(f"{words}@{part}")
    with pytest.raises(UsageError, match="two fractions"):
        read_text(f"{words}@0.1.2:1")


def test_pydoc_is_two_disjoint_parts_of_the_manual() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    whole = "\n\n".join(text for _, text in sorted(topics.items()))
    first, last = read_text("pydoc"), read_text("pydoc:eval")
    assert first.text + last.text == whole
    assert len(first.text) == round(0.8 * len(whole))
    assert "Python" in first.notes[0]


@pytest.mark.parametrize(
    ("source", "request_", "text"),
    [
        ("wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}, "a\n\nb\n\nc"),
        (
            "wikitext2:test",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
            "a\n\nb\n\nc",
        ),
        ("me/set:train:text", {"path": "me/set", "split": "train", "streaming": True}, "a\n\nb"),
        ("set:big:train:body", {"path": "set", "name": "big", "split": "train", "streaming": True}, "x\n\ny"),
    ],
)
def test_hub_requests(monkeypatch: pytest.MonkeyPatch, source: str, request_: dict[str, Any], text: str) -> None:
    rows = Rows([{"text": "a", "body": "x"}, {"text": "b", "body": "y"}, {"text": "c", "body": "z"}])
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **request: asked.append(request) or rows)
    found = read_text(source, limit=4)
    assert asked == [request_]
    assert found.text == text
    assert ("the first 2 documents only" in found.notes) == ("streaming" in request_)


def test_c4_streams_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **request: asked.append(request) or Rows([{"text": "a"}]))
    assert read_text("c4@0:1").text == "a"
    assert asked[0]["streaming"] is True
    assert list(asked[0]["data_files"]) == ["train"]


def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**request: Any) -> Rows:
        raise ValueError("the data set's script is gone\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'c4' \(the hub .* cannot be reached.*text file or 'pydoc'.*'self'"):
        read_text("c4")
    monkeypatch.setattr(datasets, "load_dataset", lambda **request: Rows([{"body": "a", "id": 1}]))
    with pytest.raises(DataError, match="row 1 has no text field 'text'; its fields: 'body', 'id'"):
        read_text("me/set:train:text")


def test_windows_are_disjoint_pieces_of_the_stream(words: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = tokenize(WORDS, tiny_tokenizer)
    found = load(words, tiny_tokenizer, samples=20)
    pieces = [tuple(row.tolist()) for row in stream[: len(stream) // 16 * 16].view(-1, 16)]
    drawn = [tuple(row.tolist()) for row in found.tokens]
    assert found.tokens.dtype == torch.int64
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(pieces)
    assert found.text_tokens == len(stream)
    assert found.notes == ()


def test_a_short_text_overlaps_and_says_so(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz0123456789" * 2, encoding="utf-8")
    stream = tokenize(path.read_text(encoding="utf-8"), tiny_tokenizer)
    found = load(str(path), tiny_tokenizer, samples=8)
    places = {tuple(stream[i : i + 16].tolist()) for i in range(len(stream) - 15)}
    assert {tuple(row.tolist()) for row in found.tokens} <= places
    assert found.describe()["notes"] == [f"windows overlap: {len(stream)} tokens for 8 sequences of 16"]


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 120), samples=st.integers(1, 60), seqlen=st.integers(1, 20), seed=st.integers(0, 9))
def test_a_draw_is_distinct_or_refused(length: int, samples: int, seqlen: int, seed: int) -> None:
    from calib.data.sources import Text
    from calib.data.tokens import _draw

    stream = torch.arange(length)
    if length < 2 * seqlen or length - seqlen + 1 < samples:
        with pytest.raises(DataError, match=f"has {length} tokens; {samples} different sequences of {seqlen} need"):
            _draw(stream, samples, seqlen, seed, Text("", "source"))
        return
    windows, notes = _draw(stream, samples, seqlen, seed, Text("", "source"))
    starts = windows[:, 0]
    assert len(set(starts.tolist())) == samples
    assert torch.equal(windows - starts[:, None], torch.arange(seqlen).expand(samples, -1))
    assert bool(notes) == (length // seqlen < samples)
    assert torch.equal(windows, _draw(stream, samples, seqlen, seed, Text("", "source"))[0])


def test_sizes_are_checked(words: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="16 tokens exceed the model's context of 8"):
        load(words, tiny_tokenizer, context=8)
    with pytest.raises(UsageError, match="at least one sequence"):
        load(words, tiny_tokenizer, samples=0)
    with pytest.raises(
        DataError, match=r"tokens; 4 different sequences of 100000 need at least 200000 \(400000 without"
    ):
        load(words, tiny_tokenizer, seqlen=100_000)


def test_the_fingerprint_follows_what_decides_the_tokens(words: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first = load(words, tiny_tokenizer)
    again = load(words, tiny_tokenizer)
    others = [
        load(words, tiny_tokenizer, seed=1),
        load(f"{words}@0:0.9", tiny_tokenizer),
        dataclasses.replace(first, tokenizer_hash="0" * 64),
        dataclasses.replace(first, tokens=first.tokens.view(8, 8)),
        dataclasses.replace(first, tokens=first.tokens + 1),
    ]
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert json.loads(json.dumps(first.describe()))["fingerprint"] == first.fingerprint


def test_the_fingerprint_is_pinned() -> None:
    tokens = torch.arange(6).view(2, 3)
    raw = b'[[2, 3], "s", 7, "h"]' + b"".join(i.to_bytes(8, "little") for i in range(6))
    assert Calibration(tokens, "s", 7, "h").fingerprint == hashlib.sha256(raw).hexdigest()


def test_the_global_generator_is_left_alone(words: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    state = torch.get_rng_state()
    load(words, tiny_tokenizer)
    assert torch.equal(state, torch.get_rng_state())


def test_the_tokenizer_hash_ignores_padding_but_not_merges(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer("a b c", truncation=True, max_length=2)
    assert tokenizer_hash(tiny_tokenizer) == before
    assert tokenizer_hash(_letters(bos=True)) != tokenizer_hash(_letters(bos=False)) != before


def test_a_document_gets_the_tokenizers_own_special_tokens_once() -> None:
    assert tokenize("abc", _letters(bos=True)).tolist() == [0, *tokenize("abc", _letters(bos=False)).tolist()]


def test_long_texts_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = _letters(bos=False)
    tokenizer.model_max_length = 4
    assert tokenize("abcdefgh", tokenizer).numel() == 8
    assert not caplog.records


def _letters(*, bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_self_calls_the_sampler(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def sampler(samples: int, seqlen: int, seed: int) -> torch.Tensor:
        return torch.full((samples, seqlen), seed)

    found = load("self", tiny_tokenizer, seed=5, sampler=sampler)
    assert found.tokens.tolist() == [[5] * 16] * 4
    assert found.describe()["notes"] == ["sampled from the model at temperature 1"]
    with pytest.raises(DataError, match="needs a model to sample from"):
        load("self", tiny_tokenizer)
    with pytest.raises(UsageError, match=r"no text to take the part 0:0\.5 of"):
        load("self", tiny_tokenizer, sampler=sampler, split=(0.0, 0.5))
    with pytest.raises(DataError, match=r"shape \(1, 16\), not \(4, 16\)"):
        load("self", tiny_tokenizer, sampler=lambda samples, seqlen, seed: torch.zeros(1, seqlen))

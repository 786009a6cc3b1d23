"""Every convention's windows against plain loops over positions: what is shown before each scored token, and which."""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from calib.data.tokens import tokenize
from calib.errors import DataError, UsageError
from evals.texts.windows import CONVENTIONS, Plan, Window, make_plan, prefix_token, starts_with_bos

Prediction = tuple[tuple[int, ...], int]  # (tokens shown, token scored)
BOS, EOS = 1, 2


class Letters:
    """A tokenizer with one token for each character; ``adds_bos`` puts BOS in front of every text."""

    def __init__(self, *, bos: int | None = BOS, eos: int | None = EOS, adds_bos: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self._adds_bos = bos, eos, adds_bos

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        front = [self.bos_token_id] if self._adds_bos and self.bos_token_id is not None else []
        return {"input_ids": front + [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def model(context: int | None = None, vocab: int = 1 << 17) -> Any:
    return SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context, vocab_size=vocab))


def distinct(count: int) -> str:
    """A text whose tokens are all different, so that a token says where it stood."""
    return "".join(chr(0x4E00 + place) for place in range(count))


def predictions(plan: Plan) -> list[list[Prediction]]:
    """By item."""
    found: list[list[Prediction]] = [[] for _ in range(1 + max(window.item for window in plan.windows))]
    for window in plan.windows:
        ids = window.ids.tolist()
        found[window.item] += [(tuple(ids[:place]), ids[place]) for place in range(window.first, len(ids))]
    return found


def slow_segments(ids: list[int], seqlen: int) -> list[list[Prediction]]:
    found = []
    while len(ids) >= seqlen:
        segment, ids = ids[:seqlen], ids[seqlen:]
        found.append([(tuple(segment[:place]), segment[place]) for place in range(1, seqlen)])
    return found


def slow_llamacpp(ids: list[int], n_ctx: int, bos: int | None) -> list[list[Prediction]]:
    """Position ``i`` predicts the token behind it, for ``i`` from ``n_ctx / 2`` to ``n_ctx - 2``."""
    found = []
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = ids[start : start + n_ctx]
        if bos is not None:
            chunk = [bos, *chunk[1:]]
        found.append([(tuple(chunk[: i + 1]), chunk[i + 1]) for i in range(n_ctx // 2, n_ctx - 1)])
    return found


def slow_sliding(ids: list[int], max_length: int, stride: int) -> list[list[Prediction]]:
    """The loop of the Hugging Face guide: labels before the last ``trg_len`` of a window are masked."""
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        trg_len = end - before
        inputs = ids[begin:end]
        labels = [None] * (len(inputs) - trg_len) + inputs[len(inputs) - trg_len :]
        shifted = [(place, label) for place, label in enumerate(labels) if place > 0 and label is not None]
        found.append([(tuple(inputs[:place]), label) for place, label in shifted])
        before = end
        if end == len(ids):
            break
    return found


def slow_document(ids: list[int], length: int, prefix: int) -> list[Prediction]:
    """Blocks of ``length`` targets; a token sees its block from the start, the last block is moved to be full."""
    stream = [prefix, *ids]
    found = []
    for place in range(1, len(stream)):  # of the target
        last = min(len(ids), -(-place // length) * length)  # of its block
        found.append((tuple(stream[max(0, last - length) : place]), stream[place]))
    return found


def harness_document(ids: list[int], length: int, prefix: int) -> list[Prediction]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("lm_eval.utils", reason="the extra lm-eval is not installed")
    found = []
    for window in utils.get_rolling_token_windows(ids, prefix, length, 1):
        shown, scored = utils.make_disjoint_window(window)
        found += [(tuple(shown + scored[:place]), token) for place, token in enumerate(scored)]
    return found


sizes = st.integers(0, 70)
lengths = st.integers(2, 24)


@given(sizes, lengths, st.none() | st.integers(1, 70), st.booleans())
def test_segments(count: int, seqlen: int, max_tokens: int | None, adds_bos: bool) -> None:
    tokenizer = Letters(adds_bos=adds_bos)
    expected = slow_segments(tokenizer(distinct(count))["input_ids"][:max_tokens], seqlen)
    if not expected:
        with pytest.raises(DataError, match="one segment needs"):
            make_plan(distinct(count), tokenizer, model(), seqlen=seqlen, max_tokens=max_tokens)
        return
    plan = make_plan(distinct(count), tokenizer, model(), seqlen=seqlen, max_tokens=max_tokens)
    assert predictions(plan) == expected
    assert sum(window.scored for window in plan.windows) == len(expected) * (seqlen - 1)
    assert plan.settings == {"seqlen": seqlen, "max_tokens": max_tokens}
    assert plan.convention == "segments"


@given(st.integers(3, 70), st.integers(3, 24), st.booleans())
def test_llamacpp(count: int, seqlen: int, adds_bos: bool) -> None:
    tokenizer = Letters(adds_bos=adds_bos)
    ids = tokenizer(distinct(count))["input_ids"]
    if len(ids) < seqlen:
        with pytest.raises(DataError, match="one segment needs"):
            make_plan(distinct(count), tokenizer, model(), convention="llamacpp", seqlen=seqlen)
        return
    plan = make_plan(distinct(count), tokenizer, model(), convention="llamacpp", seqlen=seqlen)
    assert predictions(plan) == slow_llamacpp(ids, seqlen, BOS if adds_bos else None)
    assert {window.scored for window in plan.windows} == {seqlen - seqlen // 2 - 1}
    assert plan.settings == {"seqlen": seqlen, "max_tokens": None, "bos": adds_bos}


@given(st.integers(2, 70), lengths, st.data())
def test_sliding(count: int, seqlen: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seqlen - 1))
    ids = Letters()(distinct(count))["input_ids"]
    plan = make_plan(distinct(count), Letters(), model(), convention="sliding", seqlen=seqlen, stride=stride)
    assert predictions(plan) == slow_sliding(ids, seqlen, stride)
    scored = [token for item in predictions(plan) for _, token in item]
    assert scored == ids[1:]  # every token once, but for the first
    assert plan.settings == {"seqlen": seqlen, "stride": stride, "max_tokens": None}


@given(st.integers(2, 70), st.integers(3, 24), st.booleans(), st.data())
def test_windows_that_begin_with_bos(count: int, seqlen: int, adds_bos: bool, data: st.DataObject) -> None:
    """Every token of the text once, behind BOS; that of the tokenizer is not there twice."""
    stride = data.draw(st.integers(1, seqlen - 1))
    tokenizer, ids = Letters(adds_bos=adds_bos), [ord(letter) for letter in distinct(count)]
    sliding = make_plan(
        distinct(count), tokenizer, model(), convention="sliding", seqlen=seqlen, stride=stride, bos=True
    )
    found = predictions(sliding)
    assert [token for item in found for _, token in item] == ids
    for shown, token in (one for item in found for one in item):
        assert shown[0] == BOS
        assert BOS not in shown[1:]
        assert len(shown) < seqlen
        assert shown[1:] == tuple(ids[ids.index(token) - len(shown) + 1 : ids.index(token)])
    assert all(len(window.ids) <= seqlen for window in sliding.windows)
    if count >= seqlen:
        plan = make_plan(distinct(count), tokenizer, model(), seqlen=seqlen, bos=True)
        pieces = [ids[start : start + seqlen - 1] for start in range(0, count - seqlen + 2, seqlen - 1)]
        assert predictions(plan) == [
            [((BOS, *piece[:place]), piece[place]) for place in range(seqlen - 1)] for piece in pieces
        ]
        assert plan.settings == {"seqlen": seqlen, "max_tokens": None, "bos": True}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), lengths, st.sampled_from([(BOS, EOS), (None, EOS)]))
def test_documents(counts: list[int], seqlen: int, special: tuple[int | None, int]) -> None:
    tokenizer = Letters(bos=special[0], eos=special[1])
    starts = [sum(counts[:place]) for place in range(len(counts))]
    parts = [distinct(200)[start : start + count] for start, count in zip(starts, counts, strict=True)]
    plan = make_plan("\n".join(parts), tokenizer, model(), convention="documents", seqlen=seqlen, documents="lines")
    prefix = special[1] if special[0] is None else special[0]
    assert predictions(plan) == [slow_document([ord(letter) for letter in part], seqlen, prefix) for part in parts]
    assert [token for item in predictions(plan) for _, token in item] == [ord(letter) for letter in "".join(parts)]
    for window in plan.windows:  # all but those of short documents have a full context
        assert len(window.ids) == seqlen + 1 or len(window.ids) == counts[window.item] + 1 <= seqlen
    assert plan.settings == {"seqlen": seqlen, "max_tokens": None, "documents": "lines"}


@pytest.mark.parametrize("seqlen", [2, 3, 7, 10, 11, 40])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 10, 20, 21, 39, 40, 41])
def test_documents_are_cut_as_lm_evaluation_harness_cuts_them(seqlen: int, count: int) -> None:
    plan = make_plan(distinct(count), Letters(), model(), convention="documents", seqlen=seqlen)
    assert predictions(plan) == [harness_document([ord(letter) for letter in distinct(count)], seqlen, BOS)]


def test_documents_tokenize_each_with_the_tokenizers_own_special_tokens() -> None:
    """As the harness: BOS in front as context, and once more, scored, if the tokenizer adds it to every text."""
    plan = make_plan("ab\ncd", Letters(adds_bos=True), model(), convention="documents", documents="lines")
    assert [window.ids.tolist() for window in plan.windows] == [[BOS, BOS, 97, 98], [BOS, BOS, 99, 100]]
    assert [window.first for window in plan.windows] == [1, 1]


def test_lengths_by_default() -> None:
    def seqlen(convention: str, context: int | None) -> Any:
        return make_plan(distinct(3000), Letters(), model(context), convention=convention).settings["seqlen"]

    usual = {"segments": 2048, "llamacpp": 512, "sliding": 2048, "documents": 2048}
    assert {name: seqlen(name, None) for name in CONVENTIONS} == usual
    assert {name: seqlen(name, 4096) for name in CONVENTIONS} == usual | {"documents": 4096}
    assert {name: seqlen(name, 100) for name in CONVENTIONS} == dict.fromkeys(usual, 100)
    assert make_plan(distinct(90), Letters(), model(40), convention="sliding").settings["stride"] == 10
    assert make_plan(distinct(90), Letters(), model(), convention="sliding", seqlen=3).settings["stride"] == 1


def test_max_tokens_takes_whole_documents_and_at_least_one() -> None:
    def items(max_tokens: int | None) -> int:
        options: dict[str, Any] = {"convention": "documents", "documents": "lines", "max_tokens": max_tokens}
        return 1 + make_plan("abcd\nefg\n\nhi\njklm", Letters(), model(), **options).windows[-1].item

    assert [items(most) for most in (1, 4, 6, 7, 8, 9, 12, 13, None)] == [1, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_limit_takes_the_first_items(convention: str) -> None:
    options: dict[str, Any] = {"convention": convention, "seqlen": 6}
    if convention == "documents":
        options["documents"] = "lines"
    text = "\n".join(distinct(80)[start : start + 9] for start in range(0, 80, 9))
    whole, part = (make_plan(text, Letters(), model(), limit=limit, **options) for limit in (None, 3))
    assert predictions(part) == predictions(whole)[:3]
    assert part.hashes == whole.hashes[:3]
    assert part.bytes == (whole.bytes or ())[:3]
    assert part.words == (None if whole.words is None else whole.words[:3])
    assert part.settings == whole.settings | {"limit": 3}
    assert make_plan(text, Letters(), model(), limit=999, **options).hashes == whole.hashes


def test_bytes_are_those_of_the_scored_text(tiny_tokenizer: Any) -> None:
    text = "Once upon a time there was a model that had more bits than it needed. " * 8
    for convention in ("segments", "llamacpp", "sliding"):
        plan = make_plan(text, tiny_tokenizer, model(), convention=convention, seqlen=16)
        each = [
            sum(len(tiny_tokenizer.decode([token]).encode()) for token in window.ids[window.first :].tolist())
            for window in plan.windows
        ]
        assert list(plan.bytes or ()) == each
        assert plan.words is None
    sliding = make_plan(text, tiny_tokenizer, model(), convention="sliding", seqlen=16)
    first = tiny_tokenizer.decode(tokenize(text, tiny_tokenizer)[:1].tolist())
    assert sum(sliding.bytes or ()) == len(text) - len(first)


@given(st.lists(st.text("aé東🦊 ", min_size=1, max_size=9), min_size=2, max_size=6).map(" ".join))
def test_bytes_of_any_text_are_off_by_three_an_edge_at_most(text: str) -> None:
    class Bytes(Letters):
        """A token a byte: windows begin and end inside characters."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    size = len(text.encode())
    for options in ({"convention": "sliding", "seqlen": 5}, {"seqlen": 2}, {"convention": "llamacpp", "seqlen": 3}):
        if size >= options.get("seqlen", 0):  # type: ignore[operator]
            plan = make_plan(text, Bytes(), model(), **options)  # type: ignore[arg-type]
            for found, window in zip(plan.bytes or (), plan.windows, strict=True):
                assert abs(found - window.scored) <= 2 * 3


def test_words_and_bytes_of_documents_are_those_of_the_harness() -> None:
    text = "\n = One = \n \n some  words , é \n \n = Two = \n \n x\ty \n"
    plan = make_plan(text, Letters(), model(), convention="documents")
    pages = [" = One = \n \n some  words , é \n ", " = Two = \n \n x\ty \n"]
    assert plan.settings["documents"] == "wikitext"
    assert plan.words == tuple(len(re.split(r"\s+", page)) for page in pages)
    assert plan.words == (9, 7)  # the empty strings at both ends count there, too
    assert plan.bytes == tuple(len(page.encode()) for page in pages)


def test_hashes_are_of_what_is_shown_and_scored() -> None:
    windows = (
        Window(torch.tensor([5, 6, 7]), 1, 0),
        Window(torch.tensor([6, 7, 8]), 2, 0),
        Window(torch.arange(2), 1, 1),
    )
    plan = Plan("sliding", {}, windows, None)
    first = b"1:3:" + struct.pack("<3q", 5, 6, 7) + b"2:3:" + struct.pack("<3q", 6, 7, 8)
    expected = [first, b"1:2:" + struct.pack("<2q", 0, 1)]
    assert plan.hashes == [struct.unpack("<Q", hashlib.sha256(part).digest()[:8])[0] for part in expected]


@given(st.integers(2, 12), st.data())
def test_a_hash_tells_items_apart(length: int, data: st.DataObject) -> None:
    ids, first = torch.arange(length), data.draw(st.integers(1, length - 1))
    place, item = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 3))
    changed = ids.clone()
    changed[place] += 1
    hashes = [
        Plan("segments", {}, (window,), None).hashes[-1]
        for window in (
            Window(ids, first, 0),
            Window(changed, first, 0),
            Window(ids, first + 1, 0),
            Window(torch.cat([ids, ids[:1]]), first, 0),
        )
    ]
    assert len(set(hashes)) == 4
    assert Plan("segments", {}, (Window(ids, first, item),), None).hashes[item] == hashes[0]  # wherever it stands


def with_bos(tokenizer: Any) -> Any:
    """The same tokenizer, putting BOS in front of every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_bos_is_what_the_tokenizer_puts_in_front(tiny_tokenizer: Any, text: str) -> None:
    assert not starts_with_bos(tiny_tokenizer)
    assert starts_with_bos(with_bos(tiny_tokenizer))
    assert not starts_with_bos(Letters())
    assert starts_with_bos(Letters(adds_bos=True))
    assert not starts_with_bos(Letters(bos=None, adds_bos=True))
    assert not starts_with_bos(Letters(bos=3))  # a BOS that it never adds
    ids = [tiny_tokenizer.bos_token_id, *tokenize(text, tiny_tokenizer).tolist()]
    plan = make_plan(text, with_bos(tiny_tokenizer), model(), convention="llamacpp", seqlen=12)
    assert predictions(plan) == slow_llamacpp(ids, 12, tiny_tokenizer.bos_token_id)


def test_the_prefix_is_bos_else_eos() -> None:
    assert prefix_token(Letters(bos=0, eos=7)) == 0
    assert prefix_token(Letters(bos=None, eos=0)) == 0
    with pytest.raises(DataError, match=r"neither a BOS nor an EOS token.*use --convention segments"):
        prefix_token(Letters(bos=None, eos=None))
    with pytest.raises(DataError, match="neither a BOS nor an EOS token"):
        make_plan("abc", Letters(bos=None, eos=None), model(), convention="documents")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"convention": "slidng"}, UsageError, r"unknown perplexity convention 'slidng'\. Did you mean 'sliding'\?"),
        ({"convention": "x"}, UsageError, "Known: documents, llamacpp, segments, sliding"),
        ({"seqlen": 1}, UsageError, "at least 2 tokens .* got seqlen 1"),
        ({"seqlen": 0, "convention": "documents"}, UsageError, "at least 2 tokens .* got seqlen 0"),
        ({"seqlen": 65}, DataError, "segments of 65 tokens exceed the model's context of 64; use --seqlen 64"),
        ({"seqlen": 65, "convention": "documents"}, DataError, "exceed the model's context of 64"),
        ({"seqlen": 50}, DataError, "the text has 40 tokens, one segment needs 50; give a longer text"),
        ({"seqlen": 8, "max_tokens": 7}, DataError, r"has 7 tokens \(with --max-tokens 7\), one segment needs 8"),
        ({"seqlen": 50, "convention": "llamacpp"}, DataError, "the text has 40 tokens, one segment needs 50"),
        ({"max_tokens": 1, "convention": "sliding"}, DataError, "the text has 1 tokens; at least 2 are needed"),
        ({"stride": 0, "convention": "sliding", "seqlen": 8}, UsageError, r"must be in 1 \.\. 7 .* got 0"),
        ({"stride": 8, "convention": "sliding", "seqlen": 8}, UsageError, r"must be in 1 \.\. 7 .* got 8"),
        ({"stride": 4, "seqlen": 8}, UsageError, "--stride belongs to --convention sliding; 'segments' has none"),
        ({"convention": "documents", "documents": "line"}, UsageError, "unknown rule for documents 'line'.*'lines'"),
    ],
)
def test_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_plan(distinct(40), Letters(), model(64), **options)


def test_llamacpp_needs_a_second_half() -> None:
    """Of two tokens none is in the second half: a figure over no tokens is refused."""
    with pytest.raises(UsageError, match="at least 3"):
        make_plan(distinct(40), Letters(), model(), convention="llamacpp", seqlen=2)


def test_texts_without_tokens() -> None:
    for text, rule in (("", "whole"), (" \n\n ", "lines")):
        with pytest.raises(DataError, match="no documents with tokens"):
            make_plan(text, Letters(), model(), convention="documents", documents=rule)
    with pytest.raises(DataError, match="0 tokens; at least 2"):
        make_plan("", Letters(), model(), convention="sliding")


def test_ids_that_the_model_does_not_have() -> None:
    with pytest.raises(DataError, match=r"range over 97 \.\. 122, .* has 122 entries; the tokenizer does not belong"):
        make_plan("az" * 10, Letters(), model(vocab=122), seqlen=4)
    make_plan("az" * 10, Letters(), model(vocab=123), seqlen=4)
    make_plan("aaaaz", Letters(), model(vocab=98), seqlen=4)  # what is dropped does not matter

"""Perplexity against a plain loop; bytes, errors, the chunked head."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.errors import DataError, NumericalError, UsageError
from calib.text import tokenize
from evals import perplexity
from evals.logits import ModelLogits, forward_logits
from evals.segments import mean_and_error

KINDS = ["llama", "gemma2", "gpt2", "cohere", "granite", "mixtral", "opt"]


@torch.no_grad()
def plain_nll(model: Any, tokens: Tensor, seqlen: int) -> list[list[float]]:
    """``-ln p`` of every scored token, by the definition."""
    rows = []
    for start in range(0, len(tokens) - seqlen + 1, seqlen):
        ids = tokens[start : start + seqlen]
        p = torch.softmax(model(ids[None]).logits[0].double(), dim=-1)
        rows.append([-math.log(p[i, ids[i + 1]].item()) for i in range(seqlen - 1)])
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_plain_loop(
    make_model: Callable[..., Any], tiny_tokenizer: Any, text: str, kind: str, batch_size: int
) -> None:
    model = make_model(kind)
    rows = plain_nll(model, tokenize(text, tiny_tokenizer), 24)
    found = perplexity(model, text, tiny_tokenizer, seqlen=24, batch_size=batch_size)
    mean = sum(map(sum, rows)) / (23 * len(rows))
    assert found.segments == len(rows) > 3
    assert found.tokens == 23 * len(rows)
    assert found.nll == pytest.approx(sum(map(sum, rows)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.segment_nll == pytest.approx([sum(row) / 23 for row in rows], rel=1e-5)
    assert bool(found.notes) == (kind == "opt")  # its head cannot be run by itself, and the result says so


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_chunks_equal_the_models_own_logits(make_model: Callable[..., Any], kind: str) -> None:
    model = make_model(kind)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    source = ModelLogits(model, ids[0])
    parts = list(source.chunks(ids, rows=7))
    assert source.notes == ()
    assert [len(logits) for _, logits in parts] == [7, 7, 7, 7, 7, 3]
    own = forward_logits(model, ids)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(torch.cat([logits for _, logits in parts]), own, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    before = dict(model.named_modules())
    list(ModelLogits(model, torch.arange(8)).chunks(torch.arange(16)[None]))
    assert dict(model.named_modules()) == before


def test_a_wrapped_forward_is_not_called_for_the_head(make_model: Callable[..., Any]) -> None:
    model, ids = make_model("llama"), torch.arange(24)[None]
    own = forward_logits(model, ids)[0, :-1]
    original = model.forward
    model.forward = lambda **inputs: original(**inputs)  # as the device hooks of accelerate do
    source = ModelLogits(model, ids[0])
    torch.testing.assert_close(torch.cat([logits for _, logits in source.chunks(ids, rows=5)]), own)
    assert source.notes == ()


def test_logits_that_need_more_than_hidden_states_are_found_out(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    original = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            out = original(self, **inputs)
            out.logits = out.logits * (1 + inputs["input_ids"].sum())
            return out

    model.__class__ = Scaled
    assert perplexity(model, torch.arange(64), seqlen=32).notes == (
        "Scaled: logits of whole segments at once (its head by itself gives other logits)",
    )


def test_any_torch_module_will_do() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]))

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.table(ids)
            return out

    found = perplexity(Bigram(), torch.tensor([0, 1, 0, 0, 0, 1]), seqlen=3)
    assert found.nll == pytest.approx(-math.log(3 / 4) - math.log(1 / 2) - math.log(1 / 4) - math.log(3 / 4))
    assert "no decoder below its head" in found.notes[0]
    assert found.bits_per_byte is None


def test_bytes_are_those_of_the_scored_text(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    ascii_text = "Once upon a time there was a model. " * 20
    found = perplexity(make_model("llama"), ascii_text, tiny_tokenizer, seqlen=16)
    ids = tokenize(ascii_text, tiny_tokenizer).tolist()
    scored = [t for i, t in enumerate(ids[: found.segments * 16]) if i % 16]
    assert found.bytes == sum(len(tiny_tokenizer.decode([t]).encode()) for t in scored)
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) / found.bytes)


def test_bytes_of_cut_characters_are_off_by_three_an_edge_at_most(
    make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    words = "東京" * 60  # three tokens a character, so that edges fall inside characters
    found = perplexity(make_model("llama"), words, tiny_tokenizer, seqlen=16)
    assert found.bytes == pytest.approx(15 * found.segments, abs=6 * found.segments)


def test_a_tensor_gives_what_its_text_gives(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    model = make_model("llama")
    tokens = tokenize(text, tiny_tokenizer)
    by_text = perplexity(model, text, tiny_tokenizer, seqlen=20)
    assert perplexity(model, tokens, tiny_tokenizer, seqlen=20) == by_text
    assert perplexity(model, tokens[: len(tokens) // 20 * 20].view(-1, 20), tiny_tokenizer, seqlen=20) == by_text


def test_max_tokens_and_progress(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    calls: list[tuple[int, int]] = []
    found = perplexity(
        make_model("llama"),
        text,
        tiny_tokenizer,
        seqlen=20,
        max_tokens=75,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert found.segments == 3
    assert calls == [(2, 3), (3, 3)]


def test_standard_error_is_of_segment_means(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    found = perplexity(make_model("llama"), text, tiny_tokenizer, seqlen=20)
    means = torch.tensor(found.segment_nll, dtype=torch.float64)
    assert found.standard_error == pytest.approx((means.std() / len(means) ** 0.5).item())
    assert perplexity(make_model("llama"), text, tiny_tokenizer, seqlen=20, max_tokens=20).standard_error is None
    assert mean_and_error([2.0]) == (2.0, None)


def test_the_record_is_plain_data(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    found = perplexity(make_model("llama"), text, tiny_tokenizer, seqlen=20)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["perplexity"] == found.perplexity
    assert record["segment_nll"] == list(found.segment_nll)


def test_errors(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match="a text needs a tokenizer"):
        perplexity(model, text)
    with pytest.raises(UsageError, match=r"got torch.float32 \[3\]"):
        perplexity(model, torch.zeros(3))
    with pytest.raises(UsageError, match=r"at least 2 tokens .* got seqlen 1"):
        perplexity(model, text, tiny_tokenizer, seqlen=1)
    with pytest.raises(DataError, match="segments of 129 tokens exceed the model's context of 128; use --seqlen 128"):
        perplexity(model, text, tiny_tokenizer, seqlen=129)
    with pytest.raises(DataError, match=r"the text has 3 tokens, one segment needs 64; give a longer text"):
        perplexity(model, torch.arange(3), seqlen=64)
    with pytest.raises(DataError, match=r"the text has 9 tokens \(of 90, --max-tokens 9\), one segment needs 64"):
        perplexity(model, torch.arange(90), seqlen=64, max_tokens=9)
    with pytest.raises(DataError, match=r"range over 0 \.\. 9000, .* the tokenizer does not belong to this model"):
        perplexity(model, torch.arange(0, 9001, 100), seqlen=8)


def test_nan_names_segment_and_token(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    tokens = torch.arange(48)
    model.get_input_embeddings().weight.data[37] = float("nan")  # in segment 2; attention spreads it to all of it
    with pytest.raises(NumericalError, match="score of scored token 0 in window 2 is nan"):
        perplexity(model, tokens, seqlen=16, batch_size=2)

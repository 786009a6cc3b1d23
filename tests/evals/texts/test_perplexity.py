"""Perplexity of segments against a plain loop; the model's head in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.data.tokens import tokenize
from calib.errors import NumericalError
from evals import evaluate
from evals.inference.logits import ModelLogits, forward_logits
from evals.record import TextResult

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


@pytest.fixture
def score(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., TextResult]:
    """A function of a model, a text and options of `evaluate`."""

    def run(model: Any, text: str, **options: Any) -> TextResult:
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8")
        (found,) = evaluate(model, tiny_tokenizer, texts=[str(path)], **options).texts
        return found

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_plain_loop(
    make_model: Callable[..., Any],
    tiny_tokenizer: Any,
    text: str,
    score: Callable[..., TextResult],
    kind: str,
    batch_size: int,
) -> None:
    model = make_model(kind)
    rows = plain_nll(model, tokenize(text, tiny_tokenizer), 24)
    found = score(model, text, seqlen=24, batch_size=batch_size)
    mean = sum(map(sum, rows)) / (23 * len(rows))
    assert len(found.items) == len(rows) > 3
    assert found.tokens == 23 * len(rows)
    assert found.nll == pytest.approx(sum(map(sum, rows)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.items["nll"] == pytest.approx([sum(row) for row in rows], rel=1e-5)
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


def test_logits_that_need_more_than_hidden_states_are_found_out(
    make_model: Callable[..., Any], text: str, score: Callable[..., TextResult]
) -> None:
    model = make_model("llama")
    original = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            out = original(self, **inputs)
            out.logits = out.logits * (1 + inputs["input_ids"].sum())
            return out

    model.__class__ = Scaled
    assert score(model, text, seqlen=32).notes == (
        "Scaled: logits of whole segments at once (its head by itself gives other logits)",
    )


def test_any_torch_module_will_do(tiny_tokenizer: Any, score: Callable[..., TextResult]) -> None:
    class Bigram(nn.Module):
        """Every letter follows with the same probability, but "b" after "a" with thrice the others'."""

        def __init__(self) -> None:
            super().__init__()
            a, b = tokenize("ab", tiny_tokenizer).tolist()
            self.table = nn.Embedding(len(tiny_tokenizer), len(tiny_tokenizer))
            self.table.weight.data.zero_()
            self.table.weight.data[a, b] = math.log(3.0)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.table(ids)
            return out

    found, size = score(Bigram(), "abaaab", seqlen=3), len(tiny_tokenizer)
    after_a = math.log(size + 2)
    assert found.nll == pytest.approx((after_a - math.log(3)) + math.log(size) + after_a + after_a - math.log(3))
    assert "no decoder below its head" in found.notes[0]


def test_standard_error_is_of_segment_means(
    make_model: Callable[..., Any], text: str, score: Callable[..., TextResult]
) -> None:
    found = score(make_model("llama"), text, seqlen=20)
    means = found.items["nll"] / 19
    assert len(means) < 27  # from there on neighbouring segments make runs
    assert found.standard_error == pytest.approx(np.std(means) / len(means) ** 0.5, rel=0.1)
    assert score(make_model("llama"), text, seqlen=20, max_tokens=20).standard_error is None


def test_nan_names_window_and_token(
    make_model: Callable[..., Any], tiny_tokenizer: Any, text: str, score: Callable[..., TextResult]
) -> None:
    model = make_model("llama")
    tokens = tokenize(text, tiny_tokenizer).tolist()
    first = next(place for place in range(32, 48) if tokens[place] not in tokens[:32])
    model.get_input_embeddings().weight.data[tokens[first]] = float("nan")
    with pytest.raises(NumericalError, match=r"score of scored token \d+ in window 2 is nan"):
        score(model, text, seqlen=16, batch_size=2, max_tokens=48)

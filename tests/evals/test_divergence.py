"""KL and agreement against the formula on full softmaxes; the text sources of evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calib.errors import DataError, ModelError, NumericalError, UsageError
from calib.text import tokenize
from evals import divergence, load_text, perplexity
from evals.divergence import _kl


@torch.no_grad()
def softmaxes(model: Any, segments: torch.Tensor) -> torch.Tensor:
    return torch.softmax(model(segments).logits[:, :-1].double(), dim=-1)  # [segments, seqlen - 1, vocab]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_equals_the_direct_formula(
    make_model: Callable[..., Any], tiny_tokenizer: Any, text: str, kind: str, chunk: int | None
) -> None:
    model, base = make_model(kind, 1), make_model(kind, 0)
    tokens = tokenize(text, tiny_tokenizer)
    segments = tokens[: len(tokens) // 20 * 20].view(-1, 20)
    q, p = softmaxes(model, segments), softmaxes(base, segments)
    kl = (p * (p / q).log()).sum(-1)
    found = divergence(model, base, text, tiny_tokenizer, seqlen=20, batch_size=2, chunk=chunk)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_standard_error == pytest.approx((kl.mean(1).std() / len(kl) ** 0.5).item(), rel=1e-4)
    quantiles = [found.kl_median, found.kl_p99, found.kl_p999, found.kl_max]
    assert quantiles == pytest.approx(np.quantile(kl.numpy(), [0.5, 0.99, 0.999, 1]).tolist(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())


def test_both_perplexities_are_those_of_perplexity(
    make_model: Callable[..., Any], tiny_tokenizer: Any, text: str
) -> None:
    model, base = make_model("llama", 1), make_model("llama", 0)
    found = divergence(model, base, text, tiny_tokenizer, seqlen=20)
    for result, subject in ((found.model, model), (found.base, base)):
        alone = perplexity(subject, text, tiny_tokenizer, seqlen=20)
        assert result.nll == pytest.approx(alone.nll, rel=1e-6)
        assert (result.bytes, result.tokens, result.segments) == (alone.bytes, alone.tokens, alone.segments)
    ratio, error = found.log_ratio
    differences = torch.tensor(found.model.segment_nll) - torch.tensor(found.base.segment_nll)
    assert ratio == pytest.approx(math.log(found.model.perplexity / found.base.perplexity), rel=1e-6)
    assert error == pytest.approx((differences.double().std() / len(differences) ** 0.5).item(), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(make_model: Callable[..., Any], tiny_tokenizer: Any, text: str) -> None:
    model = make_model("gemma2")
    found = divergence(model, model, text, tiny_tokenizer, seqlen=20)
    assert found.kl_max == 0
    assert found.top1_agreement == 1
    assert found.log_ratio == (0, 0)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["log_ratio"] == 0
    assert record["model"] == record["base"]


def test_a_token_that_the_base_rules_out_adds_nothing() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert _kl(p, torch.tensor([[0.25, 0.75, 0.0]]).log()).item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    assert _kl(p, torch.tensor([[1.0, 0.0, 0.0]]).log()).item() == math.inf


def test_errors(make_model: Callable[..., Any]) -> None:
    model, base = make_model("llama"), make_model("llama", 1)
    with pytest.raises(DataError, match="exceed the model's context of 128"):
        divergence(model, base, torch.arange(300), seqlen=200)
    larger = make_model("llama")
    larger.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    count = model.config.vocab_size
    with pytest.raises(ModelError, match=f"vocabularies of {count + 8} and {count} entries"):
        divergence(larger, base, torch.arange(40), seqlen=20)
    base.get_input_embeddings().weight.data[25] = float("nan")
    with pytest.raises(NumericalError, match="the base's score of token 1 in segment 1"):
        divergence(model, base, torch.arange(40), seqlen=20)


def test_evaluation_reads_the_test_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from evals import data

    asked: list[str] = []
    monkeypatch.setattr(data, "read_text", lambda source, **_: asked.append(source))
    for source in ("wikitext2", "wikitext2:validation", "c4", "wikitext2@0:0.5", "pydoc:eval", "a@b/c.txt@0.8:1"):
        load_text(source)
    assert asked == [
        "wikitext2:test",
        "wikitext2:validation",
        "c4:validation",
        "wikitext2:test@0:0.5",
        "pydoc:eval",
        "a@b/c.txt@0.8:1",
    ]


def test_self_is_no_evaluation_text(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="'self' is sampled from the model: it has no text"):
        load_text("self")
    path = tmp_path / "x.txt"
    path.write_text("0123456789", encoding="utf-8")
    assert load_text(f"{path}@0.8:1").text == "89"

"""KL and agreement against the formula on full softmaxes; the text sources of evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.data.tokens import tokenize
from calib.errors import NumericalError, UsageError
from evals import evaluate, load_text
from evals.record import Record


@pytest.fixture
def compare(tmp_path: Path, tiny_tokenizer: Any, text: str) -> Callable[..., Record]:
    """A function of a model and its base; the whole vocabulary is kept."""
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")

    def run(model: Any, base: Any) -> Record:
        return evaluate(
            model, tiny_tokenizer, texts=[str(path)], against=base, base_top_k=None, seqlen=20, cache=tmp_path / "cache"
        )

    return run


@torch.no_grad()
def softmaxes(model: Any, segments: torch.Tensor) -> torch.Tensor:
    return torch.softmax(model(segments).logits[:, :-1].double(), dim=-1)  # [segments, seqlen - 1, vocab]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_equals_the_direct_formula(
    make_model: Callable[..., Any], tiny_tokenizer: Any, text: str, compare: Callable[..., Record], kind: str
) -> None:
    model, base = make_model(kind, 1), make_model(kind, 0)
    tokens = tokenize(text, tiny_tokenizer)
    segments = tokens[: len(tokens) // 20 * 20].view(-1, 20)
    q, p = softmaxes(model, segments), softmaxes(base, segments)
    kl = (p * (p / q).log()).sum(-1)
    record = compare(model, base)
    found = record.texts[0].divergence
    assert found is not None
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    quantiles = [found.kl_median, found.kl_p99, found.kl_p999, found.kl_max]
    assert quantiles == pytest.approx(np.quantile(kl.numpy(), [0.5, 0.99, 0.999, 1]).tolist(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    true = segments[:, 1:, None]
    ratio = (p.gather(-1, true) / q.gather(-1, true)).log().mean().item()
    assert found.log_ratio == pytest.approx(ratio, rel=1e-5)
    assert record.base is not None
    perplexities = [result.texts[0].perplexity for result in (record, record.base)]
    expected = [math.exp(-r.gather(-1, true).log().mean().item()) for r in (q, p)]
    assert perplexities == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_diverge_from_itself(make_model: Callable[..., Any], compare: Callable[..., Record]) -> None:
    model = make_model("gemma2")
    found = compare(model, model).texts[0].divergence
    assert found is not None
    assert found.kl_max == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.log_ratio == pytest.approx(0, abs=1e-6)


def test_a_base_with_nan_is_refused(make_model: Callable[..., Any], compare: Callable[..., Record]) -> None:
    model, base = make_model("llama"), make_model("llama", 1)
    base.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="score of scored token 0 in window 0 is nan"):
        compare(model, base)


def test_evaluation_reads_the_test_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from evals.texts import sources as data

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

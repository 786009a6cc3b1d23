"""BOS at the start of windows: chosen by what it is worth, said in the record, the same for base and model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import evals
from calib.data.tokens import tokenize
from calib.errors import DataError, UsageError
from evals.comparison.compare import compare
from evals.job import load_workload
from evals.record import Record

Make = Callable[..., Any]
LETTERS = "01234567"  # one token each
TEXT = LETTERS * 60


class Circle(nn.Module):
    """Knows that one letter follows the other; a model that ``needs`` BOS in front forgets it all without."""

    def __init__(self, tokenizer: Any, *, needs: bool) -> None:
        super().__init__()
        ids = tokenizer(LETTERS, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(LETTERS)
        table = torch.zeros(len(tokenizer), len(tokenizer))
        table[ids, ids[1:] + ids[:1]] = 12.0
        self.table = nn.Parameter(table)
        self.bos, self.needs = tokenizer.bos_token_id, needs

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        begun = (input_ids[:, :1] == self.bos)[:, :, None]
        return self.table[input_ids] * (begun if self.needs else 1.0)


@pytest.fixture(scope="module")
def adds_bos(tiny_tokenizer: Any) -> Any:
    backend = tiny_tokenizer.backend_tokenizer.__class__.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def score(model: Any, tokenizer: Any, source: str, **options: Any) -> Record:
    return evals.evaluate(model, tokenizer, texts=[source], **({"seqlen": 16} | options))


def test_a_model_that_needs_bos_gets_it(adds_bos: Any, source: str) -> None:
    model = Circle(adds_bos, needs=True)
    (found,) = score(model, adds_bos, source).texts
    (cut,) = score(model, adds_bos, source, bos="never").texts
    assert found.settings == {"seqlen": 16, "max_tokens": None, "bos": True}
    assert found.tokens == len(TEXT) // 15 * 15  # every letter of every window, the first included
    uniform, known = math.log(len(adds_bos)), math.log1p((len(adds_bos) - 1) * math.exp(-12))
    starts = found.tokens // 15 * (uniform - known)  # nothing is known of the letter behind BOS
    assert found.nll == pytest.approx(found.tokens * known + starts, rel=1e-4)
    assert cut.settings["bos"] is False
    # in the literature's first window, which holds the one BOS of the text, the model works
    assert cut.nll == pytest.approx((cut.tokens - 14) * uniform + 14 * known, rel=1e-4)
    (note,) = [note for note in found.notes if "BOS" in note]
    assert f"cost {uniform - known:.3f} nats per token more" in note
    assert "--bos never" in note


def test_the_literature_stays_where_bos_is_worth_nothing(adds_bos: Any, source: str) -> None:
    model = Circle(adds_bos, needs=False)
    (auto,) = score(model, adds_bos, source).texts
    (never,) = score(model, adds_bos, source, bos="never").texts
    ids = tokenize(TEXT, adds_bos)  # BOS is in the first segment and in no other
    segments = ids[: len(ids) // 16 * 16].view(-1, 16)
    log_p = torch.log_softmax(model(segments), dim=-1)[:, :-1].gather(-1, segments[:, 1:, None])
    assert auto.nll == never.nll == pytest.approx(-log_p.double().sum().item(), rel=1e-5)
    assert auto.settings == never.settings == {"seqlen": 16, "max_tokens": None, "bos": False}
    assert any("it is worth 0.000 nats per token, at most 0.05 (--bos always)" in note for note in auto.notes)


def test_a_tokenizer_without_bos_changes_nothing(tiny_tokenizer: Any, source: str) -> None:
    (found,) = score(Circle(tiny_tokenizer, needs=True), tiny_tokenizer, source).texts
    assert found.settings == {"seqlen": 16, "max_tokens": None}
    assert not any("BOS" in note for note in found.notes)
    (always,) = score(Circle(tiny_tokenizer, needs=True), tiny_tokenizer, source, bos="always").texts
    assert always.settings["bos"] is True
    assert always.mean_nll < 0.2 * found.mean_nll
    (never,) = score(Circle(tiny_tokenizer, needs=True), tiny_tokenizer, source, bos="never").texts
    assert never.nll == found.nll
    assert not any("BOS" in note for note in never.notes)


@pytest.mark.parametrize("convention", ["segments", "sliding"])
def test_a_model_follows_its_base(adds_bos: Any, source: str, tmp_path: Path, convention: str) -> None:
    base, model = Circle(adds_bos, needs=True), Circle(adds_bos, needs=False)
    record = score(model, adds_bos, source, against=base, cache=tmp_path / "c", convention=convention)
    assert record.base is not None
    assert record.base.texts[0].settings["bos"] is record.texts[0].settings["bos"] is True
    assert record.texts[0].divergence is not None
    assert record.texts[0].divergence.kl_mean == pytest.approx(0.0, abs=1e-6)
    # the base's predictions are kept by convention: what was kept of the one does not serve the other
    other = score(model, adds_bos, source, against=base, cache=tmp_path / "c", convention=convention, bos="never")
    assert other.base is not None
    assert other.base.texts[0].settings["bos"] is other.texts[0].settings["bos"] is False
    assert other.base.texts[0].mean_nll > 5 * record.base.texts[0].mean_nll


def test_figures_with_and_without_are_not_compared(adds_bos: Any, source: str) -> None:
    model = Circle(adds_bos, needs=True)
    records = [score(model, adds_bos, source, bos=bos) for bos in ("always", "never")]
    for shared in (False, True):  # the first window is the same in both
        with pytest.raises(DataError, match=r"with in Circle, without in Circle\).*all with --bos never"):
            compare(records, shared=shared)


def test_conventions_of_their_own(adds_bos: Any, tiny_tokenizer: Any, source: str) -> None:
    model = Circle(adds_bos, needs=True)
    both = score(model, adds_bos, source, convention=("llamacpp", "documents"), bos="never").texts
    assert both[0].settings["bos"] is False
    assert "bos" not in both[1].settings
    assert score(model, adds_bos, source, convention="llamacpp").texts[0].settings["bos"] is True
    with pytest.raises(UsageError, match="--bos has no effect on --convention documents"):
        load_workload([], texts=[source], conventions=("documents",), bos="never")
    with pytest.raises(UsageError, match="unknown choice for --bos 'yes'"):
        load_workload([], texts=[source], bos="yes")
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(UsageError, match="--bos always needs a BOS token, and this tokenizer has none"):
        score(Circle(adds_bos, needs=False), bare, source, bos="always")

"""Scores of windows on tiny models against a loop over tokens; divergence from a kept base against both full models."""

from __future__ import annotations

import json
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.data.tokens import tokenize
from calib.errors import ModelError, NumericalError
from evals import evaluate
from evals.inference import batching
from evals.inference.batching import BatchSize
from evals.inference.logits import ModelLogits
from evals.texts import scoring
from evals.texts.kl import Scores, TopKLogprobs, score_alone
from evals.texts.scoring import keep_base, score_windows
from evals.texts.windows import CONVENTIONS, Window, make_plan

CPU = torch.device("cpu")
PAGES = " = One = \n \n Once upon a time there was a fox . \n \n" + " The quick brown fox jumps @-@ high . \n" * 6
PAGES += " \n = Two = \n \n Café , naïve , 東京 ! \n \n = Three = \n \n " + "more bits than it needed , " * 20 + "\n"


@torch.no_grad()
def slow_nll(model: Any, window: Window) -> list[float]:
    """``-ln p`` of every scored token, from the tokens before it and no others."""
    found = []
    for place in range(window.first, len(window.ids)):
        logits = model(window.ids[None, :place]).logits[0, -1]
        found.append(-torch.log_softmax(logits.double(), dim=-1)[window.ids[place]].item())
    return found


@torch.no_grad()
def log_softmaxes(model: Any, tokens: Tensor, seqlen: int) -> Tensor:
    """``ln p`` of every entry at every scored token of the segments, float64 ``[tokens, vocab]``."""
    segments = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    return torch.log_softmax(model(segments).logits[:, :-1].double(), dim=-1).flatten(0, 1)


class InPieces:
    """A source whose chunks are a few positions long, and whose memory may end."""

    def __init__(self, model: Any, rows: int | None = None, most: int = 1 << 30) -> None:
        self.source = ModelLogits(model, torch.arange(8))
        self.notes: tuple[str, ...] = ()
        self.rows, self.most = rows, most
        self.batches: list[tuple[int, ...]] = []

    def chunks(
        self, ids: Tensor, rows: int | None = None, *, scored: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        self.batches.append(tuple(ids.shape))
        for number, part in enumerate(self.source.chunks(ids, self.rows, scored=scored)):
            if ids.numel() > self.most and number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            yield part


class Memory(dict[int, TopKLogprobs]):
    """A base in memory."""

    def window(self, index: int) -> TopKLogprobs:
        return self[index]


def keep_all(source: Any, windows: list[Window], top_k: int | None, size: int | str = 2) -> Memory:
    base = Memory()
    keep_base(source, windows, BatchSize(size, CPU), top_k=top_k, store=base.__setitem__)
    return base


def some_windows(seed: int = 0) -> list[Window]:
    """Of many lengths, scored from many places."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for item, length in enumerate([9, 30, 2, 17, 30, 5]):
        ids = torch.randint(0, 300, (length,), generator=generator)
        found.append(Window(ids, max(1, length // 3), item))
    return found


def values(scores: list[Scores], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in scores])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_every_convention_equals_the_slow_loop(
    make_model: Callable[..., Any], tiny_tokenizer: Any, kind: str, convention: str
) -> None:
    model = make_model(kind)
    plan = make_plan(PAGES, tiny_tokenizer, model, convention=convention, seqlen=24, max_tokens=150)
    assert len(plan.windows) > 3
    found = score_windows(ModelLogits(model, plan.windows[0].ids), plan.windows, BatchSize("auto", CPU))
    for window, scores in zip(plan.windows, found, strict=True):
        assert scores.nll.tolist() == pytest.approx(slow_nll(model, window), abs=2e-5)
        assert scores.nll.dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_windows_of_the_whole_context(
    make_model: Callable[..., Any], tiny_tokenizer: Any, kind: str, convention: str
) -> None:
    """A model with 128 positions reads 128 tokens, also where these predict 128 others."""
    model = make_model(kind)
    plan = make_plan("fox jumps " * 90, tiny_tokenizer, model, convention=convention)
    assert plan.settings["seqlen"] == 128
    last = plan.windows[-1]
    scores = score_windows(ModelLogits(model, last.ids), [last], BatchSize(1, CPU))[0]
    assert scores.nll[-3:].tolist() == pytest.approx(slow_nll(model, Window(last.ids, len(last.ids) - 3, 0)), abs=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_documents_score_what_lm_evaluation_harness_scores(
    make_model: Callable[..., Any], tiny_tokenizer: Any, kind: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    model = make_model(kind)
    for text in (PAGES, "Once upon a time", "fox " * 300):
        plan = make_plan(text, tiny_tokenizer, model, convention="documents", documents="whole")
        scores = score_windows(ModelLogits(model, plan.windows[0].ids), plan.windows, BatchSize("auto", CPU))
        harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2)
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        expected = harness.loglikelihood_rolling([request], disable_tqdm=True)[0]
        assert sum(float(part.nll.sum()) for part in scores) == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("size", [2, 6, "auto"])
@pytest.mark.parametrize("rows", [None, 4])
def test_neither_padding_nor_pieces_change_scores(
    make_model: Callable[..., Any], kind: str, size: int | str, rows: int | None
) -> None:
    model, windows = make_model(kind), some_windows()
    found = score_windows(InPieces(model, rows), windows, BatchSize(size, CPU))
    assert [len(part.nll) for part in found] == [window.scored for window in windows]
    for window, scores in zip(windows, found, strict=True):
        alone = score_windows(InPieces(model), [window], BatchSize(1, CPU))[0]
        torch.testing.assert_close(scores.nll, alone.nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, "auto"])
@pytest.mark.parametrize("rows", [None, 5])
def test_against_a_base_of_all_tokens(make_model: Callable[..., Any], size: int | str, rows: int | None) -> None:
    model, full, windows = make_model("llama", 1), make_model("llama", 0), some_windows()
    base = keep_all(InPieces(full, rows), windows, None)
    found = score_windows(InPieces(model, rows), windows, BatchSize(size, CPU), base=base)
    for window, scores in zip(windows, found, strict=True):
        with torch.no_grad():
            log_q, log_p = (
                torch.log_softmax(m(window.ids[None]).logits[0, window.first - 1 : -1].double(), -1)
                for m in (model, full)
            )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        columns = scores.kl, scores.base_nll, scores.same_top, scores.kl_variance
        assert all(isinstance(column, Tensor) and len(column) == window.scored for column in columns)
        torch.testing.assert_close(scores.kl, kl, rtol=1e-4, atol=1e-5)
        assert scores.base_nll is not None
        assert scores.base_nll.tolist() == pytest.approx(slow_nll(full, window), abs=2e-5)
        assert scores.same_top is not None
        assert scores.same_top.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).double().tolist()


def test_what_is_kept_does_not_depend_on_batches_but_for_the_draws(make_model: Callable[..., Any]) -> None:
    full, windows = make_model("llama"), some_windows()
    single, several = (keep_all(InPieces(full, rows), windows, 7, size) for rows, size in ((None, 1), (5, 4)))
    assert list(single) == [1, 4, 3, 0, 5, 2]  # long windows first, each under its own number
    for index, window in enumerate(windows):
        first, second = single[index], several[index]
        assert first.nll.tolist() == pytest.approx(slow_nll(full, window), abs=2e-5)
        assert first.ids is not None
        assert first.ids.shape == (window.scored, 7)
        assert first.ids.tolist() == (second.ids.tolist() if second.ids is not None else None)
        torch.testing.assert_close(first.log_p, second.log_p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first.tail_mass, second.tail_mass, rtol=1e-4, atol=1e-6)


def test_rows_are_drawn_independently(make_model: Callable[..., Any]) -> None:
    """Not the same random numbers again for every chunk."""
    window = Window(torch.arange(2).repeat(20), 1, 0)
    model = make_model("llama")
    model.get_input_embeddings().weight.data[:2] = 0  # all positions predict the same
    base = keep_all(InPieces(model, 4), [window, window], 5, 1)
    drawn = torch.cat([base[index].drawn for index in range(2)])  # type: ignore[list-item]
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn) == 78


def test_out_of_memory_in_the_middle_gives_the_same_scores(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "gc", SimpleNamespace(collect=lambda: 0))  # of all imports: a sixth of a second
    model, full, windows = make_model("llama", 1), make_model("llama", 0), some_windows()
    size = BatchSize(6, CPU)
    base = Memory()
    keep_base(InPieces(full, 4, most=70), windows, size, top_k=None, store=base.__setitem__)
    assert len(size.notes) == 2
    assert sorted(base) == list(range(6))
    source, again = InPieces(model, 4, most=70), BatchSize("auto", CPU)
    found = score_windows(source, windows, again, base=base)
    assert again.notes
    expected = score_windows(InPieces(model), windows, BatchSize(1, CPU), base=keep_all(InPieces(full), windows, None))
    for name in ("nll", "kl", "base_nll", "same_top"):
        torch.testing.assert_close(values(found, name), values(expected, name), rtol=1e-4, atol=1e-5)


def test_progress_counts_windows(make_model: Callable[..., Any]) -> None:
    model, windows = make_model("llama"), some_windows()
    steps: list[int] = []
    score_windows(InPieces(model), windows, BatchSize(4, CPU), progress=steps.append)
    keep_base(InPieces(model), windows, BatchSize(4, CPU), top_k=3, store=lambda *_: None, progress=steps.append)
    assert steps == [4, 6, 4, 6]


def test_scores_that_are_not_finite(make_model: Callable[..., Any]) -> None:
    good, bad = make_model("llama"), make_model("llama")
    windows = [Window(torch.arange(20), 1, 0), Window(torch.arange(40, 60), 5, 1)]
    bad.get_input_embeddings().weight.data[47] = float("nan")  # attention spreads it to the whole window
    with pytest.raises(
        NumericalError, match=r"the model's score of scored token 0 in window 1 is nan.*--dtype float32"
    ):
        score_windows(InPieces(bad), windows, BatchSize(2, CPU))
    with pytest.raises(NumericalError, match="the model's score of scored token 0 in window 1 is nan"):
        score_windows(InPieces(bad), windows, BatchSize(2, CPU), base=keep_all(InPieces(good), windows, 5))
    with pytest.raises(NumericalError, match="scored token 0 in window 1 is nan"):
        keep_all(InPieces(bad), windows, 5)


def test_a_base_of_another_vocabulary(make_model: Callable[..., Any]) -> None:
    full, larger, windows = make_model("llama"), make_model("llama"), some_windows()
    larger.resize_token_embeddings(full.config.vocab_size + 8, mean_resizing=False)
    count = full.config.vocab_size
    with pytest.raises(ModelError, match=f"vocabularies of {count + 8} and {count} entries"):
        score_windows(InPieces(larger), windows, BatchSize(2, CPU), base=keep_all(InPieces(full), windows, 5))


@pytest.fixture
def source_text(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(text * 3, encoding="utf-8")
    return path


def error_of_runs(sums: Any, counts: Any) -> float:
    """By hand: runs of n^(1/3) neighbours are the draws, and the bootstrap's spread is (m - 1) / m of the usual one."""
    length = 1
    while (length + 1) ** 3 <= len(sums):
        length += 1
    starts = range(0, len(sums), length)
    s = [sum(sums[i : i + length].tolist()) for i in starts]
    c = [sum(counts[i : i + length].tolist()) for i in starts]
    mean = sum(s) / sum(c)
    return float(sum((a - mean * b) ** 2 for a, b in zip(s, c, strict=True)) ** 0.5 / sum(c))


@pytest.mark.parametrize("top_k", [1, 16, 64, None])
@pytest.mark.parametrize("shift", [0.02, 1.0])
def test_evaluate_agrees_with_both_models_side_by_side(
    make_model: Callable[..., Any], tiny_tokenizer: Any, source_text: Path, top_k: int | None, shift: float
) -> None:
    """The formula on full softmaxes of both models: independent code, exact."""
    full, model = make_model("llama", 0), make_model("llama", 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += shift * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    tokens = tokenize(source_text.read_text(encoding="utf-8"), tiny_tokenizer)
    log_q, log_p = (log_softmaxes(of, tokens, 20) for of in (model, full))
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    record = evaluate(
        model,
        tiny_tokenizer,
        [str(source_text)],
        against=full,
        seqlen=20,
        base_top_k=top_k,
        cache=source_text.parent / "cache",
    )
    (result,) = record.texts
    found = result.divergence
    assert found is not None
    assert found.kl_low is not None
    assert found.kl_high is not None
    assert found.kl_low - 1e-6 <= exact.mean() <= found.kl_high + 1e-6
    if top_k is None:
        assert found.kl_draw_error == 0
        assert found.kl_mean == pytest.approx(exact.mean(), rel=1e-4, abs=1e-7)
        quantiles = [found.kl_median, found.kl_p99, found.kl_p999, found.kl_max]
        expected = np.quantile(exact, [0.5, 0.99, 0.999, 1.0]).tolist()
        assert quantiles == pytest.approx(expected, rel=1e-3, abs=1e-6)
    else:
        assert 0 < found.kl_draw_error < 0.03 * exact.mean()
        assert abs(found.kl_mean - exact.mean()) < 5 * found.kl_draw_error + 1e-6
    assert found.kl_mean == pytest.approx(result.items["kl"].sum() / result.tokens)
    true = tokens[: len(tokens) // 20 * 20].view(-1, 20)[:, 1:].reshape(-1, 1)
    nll, base_nll = (-log.gather(-1, true).sum().item() for log in (log_q, log_p))
    assert found.top1_agreement == (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item()
    assert found.log_ratio == pytest.approx((nll - base_nll) / len(true), rel=1e-4, abs=1e-6)
    assert record.base is not None
    change = result.items["nll"] - record.base.texts[0].items["nll"]
    assert found.log_ratio_standard_error == pytest.approx(error_of_runs(change, result.items["tokens"]), rel=0.1)
    kl_error = error_of_runs(result.items["kl"], result.items["tokens"])
    assert found.kl_standard_error == pytest.approx(kl_error, rel=0.1)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert record.base.texts[0].nll == pytest.approx(base_nll, rel=1e-6)
    assert found.top_k == top_k


def test_change_of_the_true_tokens_probability(
    make_model: Callable[..., Any], tiny_tokenizer: Any, source_text: Path
) -> None:
    full, model = make_model("gemma2", 0), make_model("gemma2", 1)
    plan = make_plan(source_text.read_text(encoding="utf-8"), tiny_tokenizer, model, seqlen=20, max_tokens=80)
    q, p = (np.exp([-nll for window in plan.windows for nll in slow_nll(m, window)]) for m in (model, full))
    record = evaluate(
        model,
        tiny_tokenizer,
        [str(source_text)],
        against=full,
        seqlen=20,
        max_tokens=80,
        cache=source_text.parent / "cache",
    )
    found = record.texts[0].divergence
    assert found is not None
    assert found.dp_rms == pytest.approx(math.sqrt(((q - p) ** 2).mean()), rel=1e-4)
    assert found.dp_mean == pytest.approx((q - p).mean(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_a_model_against_itself(
    make_model: Callable[..., Any], tiny_tokenizer: Any, source_text: Path, convention: str
) -> None:
    model = make_model("llama")
    options: dict[str, Any] = {"convention": convention, "seqlen": 24, "limit": 5}
    record = evaluate(
        model, tiny_tokenizer, [str(source_text)], against=model, cache=source_text.parent / "cache", **options
    )
    found = record.texts[0].divergence
    assert found is not None
    assert abs(found.kl_mean) < 1e-6
    assert found.kl_max < 1e-5
    assert (found.top1_agreement, found.log_ratio, found.dp_rms) == (1, 0, 0)
    json.dumps(record.to_dict(), allow_nan=False)


def test_no_scores_outlive_their_chunk(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors that stay between large ones that go leave the heap in pieces: 30 to 50 MB per chunk of 16 MB."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def scored(logits: Tensor, targets: Tensor) -> Scores:
        alive.append(sum(old() is not None for old in made))
        scores = score_alone(logits, targets)
        made.append(weakref.ref(scores.nll))
        return scores

    monkeypatch.setattr(scoring, "score_alone", scored)
    windows = some_windows()
    found = score_windows(InPieces(make_model("llama"), 4), windows, BatchSize(6, CPU))
    assert len(made) > 10
    assert max(alive) <= 1  # the one before
    assert len({part.nll.untyped_storage().data_ptr() for part in found}) == 1  # room for the whole batch


def test_a_window_that_is_kept_holds_no_other(make_model: Callable[..., Any]) -> None:
    base = keep_all(InPieces(make_model("llama"), 4), some_windows(), 7, 6)
    for kept in base.values():
        for tensor in (kept.log_p, kept.ids, kept.drawn, kept.nll):
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

"""How far a model's predictions moved from the full model's: KL(base || model) and top-1 agreement, token by token.

The positions are those that perplexity scores (`evals.segments`), and both perplexities come out of the same pass, on
the same tokens, so that their difference is a paired one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calib.errors import ModelError
from evals.logits import LogitSource, ModelLogits
from evals.perplexity import PerplexityResult, Progress, summarize_nll
from evals.segments import as_tokens, cut_segments, mean_and_error, require_finite

__all__ = ["DivergenceResult", "divergence"]


@dataclasses.dataclass(frozen=True)
class DivergenceResult:
    """KL in nats a token; both models on the same tokens.

    Args:
        kl_mean: mean over the scored tokens.
        kl_standard_error: of the mean, from the segments' means; ``None`` for one segment.
        kl_median, kl_p99, kl_p999, kl_max: quantiles over tokens (linear between ranks).
        top1_agreement: fraction of tokens for which both models find the same token most probable.
        model: perplexity of the model.
        base: perplexity of the full model.
    """

    kl_mean: float
    kl_standard_error: float | None
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    model: PerplexityResult
    base: PerplexityResult

    @property
    def log_ratio(self) -> tuple[float, float | None]:
        """``ln(perplexity of model / of base)`` and its standard error from the segments' paired differences."""
        pairs = zip(self.model.segment_nll, self.base.segment_nll, strict=True)
        return mean_and_error([model - base for model, base in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        kl = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        ratio, error = self.log_ratio
        extra = {"log_ratio": ratio, "log_ratio_standard_error": error}
        return kl | extra | {"model": self.model.to_dict(), "base": self.base.to_dict()}


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Float64 ``[segments, seqlen - 1]`` on the CPU: nats, nats, nats, 0 or 1."""

    kl: Tensor
    model_nll: Tensor
    base_nll: Tensor
    same_top: Tensor


def divergence(
    model: Any,
    base: Any,
    tokens: Tensor | str,
    tokenizer: Any | None = None,
    *,
    seqlen: int = 2048,
    batch_size: int = 1,
    max_tokens: int | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Compare ``model`` with ``base`` on the same tokens, in one pass, with logits a chunk at a time.

    Args:
        model: the quantized model.
        base: the full model; it may be on another device.
        tokens: a text (needs ``tokenizer``), or token ids ``[tokens]`` or ``[segments, seqlen]``.
        tokenizer: as in `evals.perplexity.perplexity`.
        seqlen, batch_size, max_tokens, progress: as in `evals.perplexity.perplexity`.
        chunk: positions whose logits are held at once; ``None`` chooses by the size of the vocabulary.

    Raises:
        UsageError, DataError: as `evals.perplexity.perplexity`, for either model.
        ModelError: the vocabularies have different sizes.
        NumericalError: NaN or Inf among the scores of either model.
    """
    stream = as_tokens(tokens, tokenizer)
    cut_segments(stream, base, seqlen=seqlen, max_tokens=max_tokens)  # the base's context and vocabulary
    segments = cut_segments(stream, model, seqlen=seqlen, max_tokens=max_tokens)
    sources = ModelLogits(model, segments[0]), ModelLogits(base, segments[0])
    parts = []
    for start in range(0, len(segments), batch_size):
        batch = segments[start : start + batch_size]
        parts.append(_compare(*sources, batch, chunk))
        _require_finite(parts[-1], start)
        if progress is not None:
            progress(start + len(batch), len(segments))
    return _summarize(_join(parts), segments, tokenizer, sources)


def _compare(model: LogitSource, base: LogitSource, ids: Tensor, rows: int | None) -> _Scores:
    """Both passes over ``ids [batch, seqlen]``; the chunks of the two sources are walked side by side."""
    targets = ids[:, 1:].flatten()
    kl, model_nll, base_nll, same = (torch.empty(targets.shape, dtype=torch.float64) for _ in range(4))
    for (part, logits), (_, reference) in zip(model.chunks(ids, rows), base.chunks(ids, rows), strict=True):
        if logits.shape != reference.shape:
            raise ModelError(
                f"the models have vocabularies of {logits.shape[-1]} and {reference.shape[-1]} entries: "
                "divergence is defined between a model and its own full-precision base."
            )
        log_q = F.log_softmax(logits.float(), dim=-1)  # [rows, vocab]
        log_p = F.log_softmax(reference.to(logits.device).float(), dim=-1)
        index = targets[part].to(logits.device)[:, None]
        kl[part] = _kl(log_p, log_q).cpu()
        model_nll[part] = -log_q.gather(1, index)[:, 0].double().cpu()
        base_nll[part] = -log_p.gather(1, index)[:, 0].double().cpu()
        same[part] = (log_q.argmax(-1) == log_p.argmax(-1)).double().cpu()
    return _Scores(*(values.view(len(ids), -1) for values in (kl, model_nll, base_nll, same)))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum p (ln p - ln q)`` in nats, float64 ``[rows]``; a token that the base rules out adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1, dtype=torch.float64)


def _require_finite(scores: _Scores, first_segment: int) -> None:
    require_finite(scores.base_nll, "the base's score", first_segment)
    require_finite(scores.model_nll, "the model's score", first_segment)
    require_finite(scores.kl, "the divergence", first_segment)


def _join(parts: list[_Scores]) -> _Scores:
    names = [field.name for field in dataclasses.fields(_Scores)]
    return _Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _summarize(
    scores: _Scores, segments: Tensor, tokenizer: Any | None, sources: tuple[ModelLogits, ModelLogits]
) -> DivergenceResult:
    mean, error = mean_and_error(scores.kl.mean(dim=1).tolist())
    median, p99, p999, top = (float(q) for q in np.quantile(scores.kl.numpy(), [0.5, 0.99, 0.999, 1.0]))
    return DivergenceResult(
        mean,
        error,
        median,
        p99,
        p999,
        top,
        float(scores.same_top.mean()),
        summarize_nll(scores.model_nll, segments, tokenizer, sources[0].notes),
        summarize_nll(scores.base_nll, segments, tokenizer, sources[1].notes),
    )

"""Perplexity by the protocol of the quantization literature, and bits per byte of the same scored text.

The text is tokenized once and cut as in `evals.segments`. With ``m_i`` the mean of ``-ln p`` over the ``seqlen - 1``
scored tokens of segment ``i``, the perplexity is ``exp(mean of m_i)``. All segments are equally long, so this is also
``exp`` of the mean over all scored tokens. It is not the number of llama.cpp (second half of each chunk, BOS in front)
nor that of lm-evaluation-harness (per word or byte of single documents) nor that of a sliding window: `evals.evaluate`
has these, and puts them into a record. Here is the one figure, in one call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evals.batching import BatchSize
from evals.logits import ModelLogits
from evals.segments import as_tokens, cut_segments, mean_and_error
from evals.text_scores import score_windows
from evals.windows import Window, window_bytes

__all__ = ["PerplexityResult", "Progress", "perplexity"]

Progress = Callable[[int, int], None]  # segments done, segments in all


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """What was scored and how well it was predicted.

    Args:
        nll: sum of ``-ln p`` over the scored tokens, in nats.
        tokens: scored tokens, ``segments * (seqlen - 1)``.
        bytes: UTF-8 bytes of the scored tokens' text; ``None`` without a tokenizer.
        segments: number of segments.
        seqlen: tokens in each.
        segment_nll: mean ``-ln p`` of each segment, in nats a token.
        notes: what a reader must know (logits not computed in chunks).
    """

    nll: float
    tokens: int
    bytes: int | None
    segments: int
    seqlen: int
    segment_nll: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def mean_nll(self) -> float:
        """Nats a scored token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(mean_nll)``; infinite where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 709.0 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of information a byte of text, comparable between tokenizers; ``None`` without a tokenizer."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def standard_error(self) -> float | None:
        """Of `mean_nll`, from the segments' means; ``None`` for one. Times `perplexity` it is the perplexity's."""
        return mean_and_error(self.segment_nll)[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        fields = dataclasses.asdict(self) | {"segment_nll": list(self.segment_nll), "notes": list(self.notes)}
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "mean_nll": self.mean_nll,
            "standard_error": self.standard_error,
            **fields,
        }


def perplexity(
    model: Any,
    tokens_or_text: Tensor | str,
    tokenizer: Any | None = None,
    *,
    seqlen: int = 2048,
    batch_size: int = 1,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score a text with a causal language model, quantized or not, on the device where it is.

    Args:
        model: a Hugging Face causal language model, or any torch module from ids ``[batch, seqlen]`` to logits.
        tokens_or_text: a text (needs ``tokenizer``), or token ids ``[tokens]`` or ``[segments, seqlen]``.
        tokenizer: also gives the bytes; without it there are no bits per byte.
        seqlen: tokens in a segment. Longer segments give lower perplexity: always say which.
        batch_size: segments run at the same time.
        max_tokens: use the first so many tokens of the text only.
        progress: called after every batch with segments done and in all.

    Raises:
        UsageError: a text without a tokenizer, ``seqlen`` below 2, tokens of a wrong shape.
        DataError: ``seqlen`` exceeds the context, the text is shorter than a segment, the tokenizer is not the model's.
        NumericalError: NaN or Inf among the scores.
    """
    tokens = as_tokens(tokens_or_text, tokenizer)
    segments = cut_segments(tokens, model, seqlen=seqlen, max_tokens=max_tokens)
    source = ModelLogits(model, segments[0])
    windows = [Window(ids, 1, number) for number, ids in enumerate(segments)]
    step = None if progress is None else functools.partial(_report, progress, len(windows))
    scores = score_windows(source, windows, BatchSize(batch_size, source.device), progress=step)
    return summarize_nll(torch.stack([part.nll for part in scores]), segments, tokenizer, source.notes)


def _report(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def summarize_nll(nll: Tensor, segments: Tensor, tokenizer: Any | None, notes: tuple[str, ...]) -> PerplexityResult:
    """The result of scores ``nll [segments, seqlen - 1]`` of ``segments [segments, seqlen]``."""
    windows = [Window(ids, 1, number) for number, ids in enumerate(segments)]
    size = None if tokenizer is None else sum(window_bytes(windows, tokenizer))
    count, seqlen = segments.shape
    means = tuple(nll.mean(dim=1).tolist())
    return PerplexityResult(float(nll.sum()), nll.numel(), size, count, seqlen, means, notes)

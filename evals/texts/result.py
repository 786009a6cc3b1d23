"""The result of a text: perplexity by one convention, and the divergence from a base."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from evals.items import Items, plain_fields
from evals.statistics import mean_and_error, neighbours, safe_exp

__all__ = ["Divergence", "TextResult"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far predictions moved from the base's, token by token, in nats: KL(base || model).

    Args:
        kl_mean: over scored tokens.
        kl_standard_error: of ``kl_mean``, by bootstrap over the text's segments.
        kl_median: over tokens.
        kl_p99: 99 % quantile over tokens (linear between ranks).
        kl_p999: 99.9 % quantile over tokens.
        kl_max: over tokens.
        kl_low: the exact mean is not below it, whatever was drawn; it is the mean for the full vocabulary.
        kl_high: the exact mean is not above it; it is the mean for the full vocabulary.
        kl_draw_error: standard error that drawing from the base's less likely tokens adds; 0 for the full vocabulary.
        top1_agreement: share of tokens for which both find the same token most probable.
        top1_standard_error: of it, by the same bootstrap.
        dp_rms: root of the mean squared change of the true token's probability.
        dp_mean: its mean change; negative where the model became worse.
        log_ratio: ``ln(perplexity / base's)``, paired.
        log_ratio_standard_error: of ``log_ratio``, by the same bootstrap.
        top_k: likeliest tokens of the base that were kept; ``None`` for all.
        base: fingerprint of the base.
    """

    kl_mean: float
    kl_standard_error: float | None
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    kl_low: float | None
    kl_high: float | None
    kl_draw_error: float
    top1_agreement: float
    top1_standard_error: float | None
    dp_rms: float
    dp_mean: float
    log_ratio: float
    log_ratio_standard_error: float | None
    top_k: int | None
    base: str


@dataclasses.dataclass(frozen=True, eq=False)
class TextResult:
    """Perplexity of a text by one convention.

    Args:
        name: as asked for.
        source: file or data set.
        sha256: of the text.
        convention: ``segments``, ``llamacpp``, ``sliding`` or ``documents`` (docs/evaluation.md).
        settings: ``seqlen`` and whatever else decides what is scored.
        nll: sum of ``-ln p`` over the scored tokens, in nats.
        tokens: scored ones.
        words: scored ones; ``None`` where unknown.
        bytes: scored ones; ``None`` where unknown.
        items: a segment, chunk, window or document each: ``nll`` (nats), ``tokens``, and where known ``bytes``,
            ``words``; with a base also ``kl`` (sum, nats) and ``same_top`` (count).
        divergence: against the base, if there was one.
        notes: what a reader must know.
        seconds: of scoring.
    """

    name: str
    source: str
    sha256: str
    convention: str
    settings: dict[str, Any]
    nll: float
    tokens: int
    words: int | None
    bytes: int | None
    items: Items
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def mean_nll(self) -> float:
        """Nats a scored token."""
        return self.nll / self.tokens

    @property
    def standard_error(self) -> float | None:
        """Of `mean_nll`, from the items' means weighted by their tokens; ``None`` for one item."""
        return mean_and_error(self.items["nll"], self.items["tokens"], clusters=self.clusters)[1]

    @property
    def clusters(self) -> np.ndarray[Any, Any] | None:
        """Group of each item, where neighbours are no independent draws; documents are."""
        return None if self.convention == "documents" else neighbours(len(self.items))

    @property
    def perplexity(self) -> float | None:
        """``exp(mean_nll)``, per token; ``None`` where that overflows."""
        return safe_exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; ``None`` where the bytes are unknown."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """``exp`` of nats per byte."""
        return safe_exp(self.nll / self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """``exp`` of nats per word; only whole documents have words."""
        return safe_exp(self.nll / self.words) if self.words else None

    def to_dict(self) -> dict[str, Any]:
        """JSON data: the fields and the figures that follow from them."""
        figures = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mean_nll", "standard_error")
        divergence = None if self.divergence is None else dataclasses.asdict(self.divergence)
        return plain_fields(self) | {"divergence": divergence} | {name: getattr(self, name) for name in figures}

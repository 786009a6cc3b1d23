"""A stream of tokens -> segments to score: the protocol that perplexity and divergence share.

The tokens are cut into disjoint segments of ``seqlen``; the remainder is dropped. The first token of a segment is
context only, the other ``seqlen - 1`` are scored, each given the tokens before it in its segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calib.errors import DataError, NumericalError, UsageError
from calib.text import tokenize

__all__ = ["as_tokens", "context_length", "cut_segments", "mean_and_error", "require_finite"]


def as_tokens(tokens_or_text: Tensor | str, tokenizer: Any | None) -> Tensor:
    """Token ids int64 ``[tokens]`` of a text, or of a tensor ``[tokens]`` or ``[segments, seqlen]``.

    Raises:
        UsageError: a text without a tokenizer, or a tensor of another shape or kind.
    """
    if isinstance(tokens_or_text, str):
        if tokenizer is None:
            raise UsageError("a text needs a tokenizer; give one, or give token ids.")
        return tokenize(tokens_or_text, tokenizer)
    if tokens_or_text.dim() not in (1, 2) or tokens_or_text.is_floating_point():
        raise UsageError(
            "tokens must be whole numbers of shape [tokens] or [segments, seqlen], "
            f"got {tokens_or_text.dtype} {list(tokens_or_text.shape)}."
        )
    return tokens_or_text.flatten().to("cpu", torch.int64)


def context_length(model: Any) -> int | None:
    """The longest sequence that a model's config names, or ``None`` if it names none."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def cut_segments(tokens: Tensor, model: Any, *, seqlen: int, max_tokens: int | None = None) -> Tensor:
    """Disjoint segments ``[segments, seqlen]`` of ``tokens [tokens]``; the remainder is dropped.

    Raises:
        UsageError: ``seqlen`` below 2.
        DataError: ``seqlen`` exceeds the model's context, there is not one segment, or ids the model has no row for.
    """
    if seqlen < 2:
        raise UsageError(f"a segment needs at least 2 tokens (the first is context only), got seqlen {seqlen}.")
    context = context_length(model)
    if context is not None and seqlen > context:
        raise DataError(f"segments of {seqlen} tokens exceed the model's context of {context}; use --seqlen {context}.")
    used = tokens if max_tokens is None else tokens[:max_tokens]
    count = used.numel() // seqlen
    if count == 0:
        cap = "" if max_tokens is None else f" (of {tokens.numel()}, --max-tokens {max_tokens})"
        raise DataError(
            f"the text has {used.numel()} tokens{cap}, one segment needs {seqlen}; "
            "give a longer text or a shorter --seqlen."
        )
    check_vocabulary(used, model)
    return used[: count * seqlen].view(count, seqlen)


def check_vocabulary(tokens: Tensor, model: Any) -> None:
    size = getattr(_text_config(model), "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (isinstance(size, int) and high >= size):
        raise DataError(
            f"the tokens range over {low} .. {high}, but the model's vocabulary has {size} entries; "
            "the tokenizer does not belong to this model."
        )


def require_finite(values: Tensor, what: str, first_segment: int) -> None:
    """Raise if a score is NaN or infinite.

    Args:
        values: ``[segments, targets]``.
        what: the score's name, for the message.
        first_segment: number of the first row.

    Raises:
        NumericalError: names the segment and the token.
    """
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        segment, target = bad[0].tolist()
        raise NumericalError(
            f"{what} of token {target + 1} in segment {first_segment + segment} is {values[segment, target].item()}: "
            "the model's logits are not finite. Try --dtype float32; if that does not help, the checkpoint is damaged."
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error ``sd / sqrt(n)`` with ``n - 1`` in the variance; ``None`` for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

"""Whether the segments of a text begin with BOS: as the model was made, or as the literature cuts a text.

The literature of quantization tokenizes a text once and cuts it, so that only the first segment begins with BOS. Most
models hardly notice, and their published figures are of that kind. Some do not work without BOS at all: their figure
would be that of a broken model. Where the tokenizer adds BOS, the beginning of the text is therefore scored both ways,
and the literature's way is kept unless BOS is worth more than a fixed number of nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.data.bos import starts_with_bos, window_bos, with_bos, without_bos
from calib.data.tokens import tokenize
from evals.inference.batching import BatchSize
from evals.inference.logits import LogitSource
from evals.job import TextJob
from evals.texts.scoring import score_windows
from evals.texts.windows import Window, check_vocabulary, context_length

__all__ = ["LEAST_GAIN_NATS", "choose_bos", "follow_base"]

LEAST_GAIN_NATS = 0.05
"""Per token; BOS that is worth less is left to the convention. A factor of 1.05 of the perplexity."""
_TRIAL_SEQLEN = 512
_TRIAL_TOKENS = 2048
_CUT = ("segments", "sliding")
"""Conventions that the literature computes without BOS; `llamacpp` and `documents` have rules of their own."""

Choice = tuple[bool | None, tuple[str, ...]]


def choose_bos(
    job: TextJob, tokenizer: Any, model: Any, source: Callable[[Tensor], LogitSource], size: BatchSize
) -> Choice:
    """What `evals.texts.windows.make_plan` takes for ``bos``, and a line for the reader where it was a question.

    Args:
        job: its option ``bos`` is ``auto``, ``always`` or ``never``.
        tokenizer: of the model.
        model: its context and vocabulary are checked.
        source: gives the model's logits; called with a first sequence, and only if the two ways are tried.
        size: sequences at once.

    Raises:
        UsageError: an unknown choice, or ``always`` with a tokenizer that has no BOS token.
        NumericalError: a score is NaN or infinite.
    """
    choice = str(job.options.get("bos", "auto"))
    if job.convention == "documents":
        return None, ()
    bos, adds = window_bos(tokenizer, choice, "--bos"), starts_with_bos(tokenizer)
    if choice == "auto" and (bos is None or job.convention not in _CUT):
        return None, ()
    if choice != "auto":
        return choice == "always", _said(choice, adds) if job.convention in _CUT else ()
    trial = _trial(job, tokenizer, int(bos or 0), model)
    if trial is None:
        return False, ()
    plain, begun = trial
    logits = source(begun[0].ids)
    without, within = (_mean_nll(logits, windows, size) for windows in (plain, begun))
    return _decided(without - within, sum(window.scored for window in plain))


def follow_base(settings: dict[str, Any]) -> Choice:
    """The choice that a base was scored by, from the settings of its result: the model is shown the same windows."""
    bos = settings.get("bos")
    if bos is None:
        return None, ()
    return bool(bos), (f"windows {'begin with' if bos else 'without'} BOS, as the base was scored",)


def _said(choice: str, adds: bool) -> tuple[str, ...]:
    """A line where the user's choice is not what the tokenizer, or not what the literature does."""
    if choice == "always":
        other = "the literature's begin without" if adds else "the tokenizer puts none before a text"
        return (f"every window begins with BOS (--bos always); {other}",)
    return ("windows without BOS (--bos never), although the tokenizer puts one before a text",) if adds else ()


def _decided(gain: float, tokens: int) -> Choice:
    if gain > LEAST_GAIN_NATS:
        return True, (
            "every window begins with BOS, as the tokenizer begins every text: without it, as the literature cuts a "
            f"text (--bos never), the first {tokens:,} tokens cost {gain:.3f} nats per token more",
        )
    return False, (
        "windows without BOS, as the literature cuts a text, although the tokenizer begins every text with it: on the "
        f"first {tokens:,} tokens it is worth {gain:.3f} nats per token, at most {LEAST_GAIN_NATS} (--bos always)",
    )


def _trial(job: TextJob, tokenizer: Any, bos: int, model: Any) -> tuple[list[Window], list[Window]] | None:
    """The first tokens of a text as windows without and with BOS, of which the same tokens are scored."""
    tokens = without_bos(tokenize(job.text.text, tokenizer, special_tokens=not job.text.templated), bos)
    tokens = tokens[: job.options.get("max_tokens")]
    # windows as short as those that will be scored: what BOS is worth lies at their beginning
    seqlen = min(job.options.get("seqlen") or _TRIAL_SEQLEN, context_length(model) or _TRIAL_SEQLEN, _TRIAL_SEQLEN)
    length = min(max(2, seqlen - 1), len(tokens))
    if length < 2:
        return None
    count = min(_TRIAL_TOKENS, len(tokens)) // length
    cut = tokens[: count * length].view(count, length)
    begun = with_bos(cut, bos)
    check_vocabulary(begun, model)
    return (
        [Window(ids, 1, item) for item, ids in enumerate(cut)],
        [Window(ids, 2, item) for item, ids in enumerate(begun)],
    )


def _mean_nll(logits: LogitSource, windows: list[Window], size: BatchSize) -> float:
    return float(torch.cat([scores.nll for scores in score_windows(logits, windows, size)]).mean())

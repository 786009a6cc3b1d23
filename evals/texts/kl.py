"""The base's predictions, all of them or the likeliest with a sample of the rest, and what a model's differ by.

Let ``p`` be the base's and ``q`` the model's distribution, ``T`` the base's ``k`` likeliest tokens, and ``P``, ``Q``
the probabilities that ``p`` and ``q`` give to all others together. With ``inside = sum_T p ln(p / q)``,

    lower = inside + P ln(P / Q)
    upper = inside + sum_rest p ln p - P min ln q
    found = inside + P mean_s(ln(p_s / q_s)),        s: 64 tokens drawn from the rest by p, when the base was run

``lower <= KL(p || q) <= upper`` always: lumping outcomes never increases a divergence, and no token has a smaller
``q`` than the smallest. ``found`` is right on average over the draws, and its variance is known from the sample; that
of a mean over thousands of tokens is tiny, while ``lower`` misses a tenth (language models leave much to the rest).
Where the two distributions are near (``lower`` below 0.02 nats), ``q_s / p_s - 1`` less its known mean is added to the
sample: it cancels most of the noise there, and would add some elsewhere. With all of the vocabulary kept, all three
are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from calib.errors import ModelError

__all__ = ["DRAWS", "Scores", "TopKLogprobs", "join", "keep_top_k", "put", "reserve", "score_against", "score_alone"]

_SMALLEST = 1e-30  # a rest below this is none
DRAWS = 64
_NEAR = 0.02  # nats; it may depend on anything but the draws
Rows = TypeVar("Rows", "TopKLogprobs", "Scores")


@dataclasses.dataclass(frozen=True)
class TopKLogprobs:
    """The base's predictions at ``rows`` positions. All tensors on one device.

    Args:
        log_p: float32 ``[rows, k]``: ``ln p`` of the likeliest tokens; of all tokens, in order, if ``ids`` is ``None``.
        ids: int64 ``[rows, k]``, which tokens these are.
        tail_mass: float32 ``[rows]``, ``P``, the probability of all others.
        tail_entropy: float32 ``[rows]``, ``sum p ln p`` over the others (not positive).
        drawn: int64 ``[rows, draws]``, tokens drawn from the others by ``p``; ``None`` if ``ids`` is.
        drawn_log_p: float32 ``[rows, draws]``, their ``ln p``.
        nll: float32 ``[rows]``, ``-ln p`` of the true token.
        top: int64 ``[rows]``, the likeliest token.
        vocab: entries in the base's vocabulary.
    """

    log_p: Tensor
    ids: Tensor | None
    tail_mass: Tensor
    tail_entropy: Tensor
    drawn: Tensor | None
    drawn_log_p: Tensor | None
    nll: Tensor
    top: Tensor
    vocab: int

    def part(self, place: slice, device: torch.device) -> TopKLogprobs:
        """Some rows, on a device."""
        return _map(self, lambda value: value[place].to(device))


@dataclasses.dataclass(frozen=True)
class Scores:
    """Token by token, float64 ``[tokens]`` on the CPU; all but the first only with a base.

    Args:
        nll: ``-ln q`` of the true token.
        kl: ``found`` of the module's docstring.
        kl_low: ``lower`` of the module's docstring.
        kl_high: ``upper`` of the module's docstring.
        kl_variance: of ``kl``, by the draws.
        same_top: 1 where both find the same token likeliest.
        base_nll: ``-ln p`` of the true token.
    """

    nll: Tensor
    kl: Tensor | None = None
    kl_low: Tensor | None = None
    kl_high: Tensor | None = None
    kl_variance: Tensor | None = None
    same_top: Tensor | None = None
    base_nll: Tensor | None = None

    def part(self, place: slice) -> Scores:
        """Some tokens; the tensors are views."""
        return _map(self, lambda value: value[place])


def keep_top_k(logits: Tensor, targets: Tensor, top_k: int | None, generator: torch.Generator) -> TopKLogprobs:
    """What to remember of ``logits [rows, vocab]`` for the true tokens ``targets [rows]``.

    Args:
        logits: of the base.
        targets: int64.
        top_k: how many tokens; ``None`` or the vocabulary's size for all.
        generator: of the draws, on the logits' device.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    rows, vocab = log_p.shape
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    top = log_p.argmax(dim=-1)
    if top_k is None or top_k >= vocab:
        nothing = torch.zeros(2, rows, device=logits.device)
        return TopKLogprobs(log_p, None, nothing[0].clone(), nothing[1].clone(), None, None, nll, top, vocab)
    likeliest, ids = log_p.topk(top_k, dim=-1)
    others = log_p.exp().scatter_(1, ids, 0.0)
    entropy = torch.where(others > 0, others * log_p, 0.0).sum(dim=-1)
    rest = others.sum(dim=-1)
    others.nan_to_num_(0.0).clamp_(min=_SMALLEST)  # NaN, which the scores will show, would end an accelerator's process
    drawn = torch.multinomial(others, DRAWS, replacement=True, generator=generator)
    return TopKLogprobs(likeliest, ids, rest, entropy, drawn, log_p.gather(1, drawn), nll, top, vocab)


def score_alone(logits: Tensor, targets: Tensor) -> Scores:
    """``-ln q`` of ``targets [rows]`` by ``logits [rows, vocab]``; the softmax is in float32."""
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return Scores(loss.double().cpu())


def score_against(logits: Tensor, targets: Tensor, base: TopKLogprobs) -> Scores:
    """Compare ``logits [rows, vocab]`` of the model with what was kept of the base at the same positions.

    Raises:
        ModelError: the vocabularies have different sizes.
    """
    if logits.shape[-1] != base.vocab:
        raise ModelError(
            f"the models have vocabularies of {logits.shape[-1]} and {base.vocab} entries: "
            "divergence is defined between a model and its own full-precision base."
        )
    log_q = torch.log_softmax(logits.float(), dim=-1)
    same = log_q.argmax(dim=-1) == base.top
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    values = (nll, *_divergence(log_q, base), same, base.nll)
    return Scores(*(value.double().cpu() for value in values))


def _divergence(log_q: Tensor, base: TopKLogprobs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``found, lower, upper`` and the variance of ``found``, float64 ``[rows]``; writes over ``log_q``."""
    p = base.log_p.exp()
    chosen = log_q if base.ids is None else log_q.gather(1, base.ids)
    inside = torch.where(p > 0, p * (base.log_p - chosen), 0.0).sum(dim=-1, dtype=torch.float64)
    if base.ids is None or base.drawn is None or base.drawn_log_p is None:
        return inside, inside, inside, torch.zeros_like(inside)
    least = log_q.amin(dim=-1).double()
    change = (log_q.gather(1, base.drawn) - base.drawn_log_p).double()  # ln q_s / p_s  [rows, draws]
    log_rest = torch.logsumexp(log_q.scatter_(1, base.ids, -torch.inf), dim=-1).double()  # ln Q
    rest, entropy = base.tail_mass.double(), base.tail_entropy.double()
    empty = rest <= _SMALLEST
    lower = inside + torch.where(empty, 0.0, rest * (rest.clamp_min(_SMALLEST).log() - log_rest))
    upper = inside + torch.where(empty, 0.0, entropy - rest * least)
    near = (lower < _NEAR)[:, None]
    terms = torch.where(near, change.expm1() - change, -change)
    known = torch.where(near[:, 0], rest - log_rest.exp(), 0.0)  # minus P times the mean of q_s / p_s - 1
    found = inside + torch.where(empty, 0.0, rest * terms.mean(dim=-1) + known)
    variance = torch.where(empty, 0.0, rest.square() * terms.var(dim=-1) / terms.shape[-1])
    return found, lower, torch.maximum(upper, lower), variance


def reserve(part: Rows, rows: int) -> Rows:
    """Room on the CPU for ``rows`` rows of what ``part`` holds of a few, to be filled by `put`.

    Results are copied into place as they are made, and nothing small outlives the logits that it was made from. A list
    of small tensors would lie between blocks of tens of megabytes that come and go: the allocator could use none of
    them again, and a text of 4,096 tokens took 13 GB at a vocabulary of 262,144.
    """
    return _map(part, lambda value: torch.empty((rows, *value.shape[1:]), dtype=value.dtype))


def put(room: Rows, place: slice, part: Rows) -> None:
    """Copy ``part`` to the rows at ``place``."""
    for field in dataclasses.fields(room):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            getattr(room, field.name)[place].copy_(value)


def join(parts: Sequence[TopKLogprobs]) -> TopKLogprobs:
    """Rows one after another as one."""
    if len(parts) == 1:
        return parts[0]
    room, start = reserve(parts[0], sum(len(part.nll) for part in parts)), 0
    for part in parts:
        put(room, slice(start, start + len(part.nll)), part)
        start += len(part.nll)
    return room


def _map(rows: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    """All tensors of ``rows`` changed, the rest as it is."""
    values: dict[str, Any] = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    changed: dict[str, Any] = {
        name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()
    }
    return type(rows)(**changed)

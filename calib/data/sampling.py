"""Ancestral sampling with the key-value cache: calibration data from the model itself, and ``ptq generate``.

Every draw is the inverse of the distribution function at a uniform number that was drawn beforehand, so that a sequence
depends on its own row of numbers and neither on the batch it shares nor on a generator's state on some device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from calib.errors import ModelError, NumericalError
from calib.model.cache import cache_argument, returned_cache

__all__ = ["check_token", "draw", "sample_from_model", "sample_steps"]


@torch.no_grad()
def sample_from_model(
    model: Any, samples: int, seqlen: int, seed: int, *, batch: int = 8, bos: int | str | None = "config"
) -> Tensor:
    """Sequences that the model itself writes, at temperature 1, from its first special token on.

    A sequence without a BOS token starts from a token drawn at random. An end-of-text token does not end a sequence.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        samples: number of sequences.
        seqlen: tokens in each, the first one included.
        seed: of a generator of its own.
        batch: sequences written at the same time; memory for speed, no other effect than rounding.
        bos: the token that every sequence begins with; ``"config"`` is that of the model's config, if it has one.

    Returns:
        int64 ``[samples, seqlen]`` on the CPU.

    Raises:
        ModelError: the model keeps no key-value cache.
        NumericalError: NaN or Inf among the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(samples, seqlen, generator=generator, dtype=torch.float64)
    first = _first_tokens(model, uniform[:, 0], bos)  # [samples]
    rows = []
    for start in range(0, samples, batch):
        prompt = first[start : start + batch, None]  # [batch, 1]
        steps = list(sample_steps(model, prompt, uniform[start : start + batch, 1:]))
        rows.append(torch.stack([prompt[:, 0], *steps], dim=1))
    return torch.cat(rows)


@torch.no_grad()
def sample_steps(model: Any, prompt: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Iterator[Tensor]:
    """Continue ``prompt``, one token a sequence at a time.

    Args:
        model: a Hugging Face causal language model.
        prompt: int64 ``[batch, tokens]``, at least one token, no padding.
        uniform: float64 ``[batch, steps]`` in [0, 1); one number a token to be drawn.
        temperature: 0 takes the most probable token.

    Yields:
        int64 ``[batch]`` on the CPU, ``steps`` times.

    Raises:
        ModelError, NumericalError: as `sample_from_model`.
    """
    cache, ids = None, prompt
    for step in range(uniform.shape[1]):
        out = model(input_ids=ids.to(model.device), use_cache=True, **cache_argument(model, cache))
        cache = returned_cache(out)
        if cache is None:
            raise ModelError(f"{type(model).__name__} returns no key-value cache, so it cannot be sampled from here.")
        token = check_token(draw(out.logits[:, -1].float(), uniform[:, step], temperature).cpu())  # [batch]
        yield token
        ids = token[:, None]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Where the distribution function of each row of ``logits [batch, vocab]`` passes ``uniform [batch]``.

    Returns:
        int64 ``[batch]`` on the device of the logits, which is not waited for; -1 for a row with NaN or Inf.
    """
    finite = torch.isfinite(logits.amax(dim=-1))
    if temperature == 0:
        return torch.where(finite, logits.argmax(dim=-1), -1)
    weights = torch.softmax(logits / temperature, dim=-1).double()
    cumulative = weights.cumsum(dim=-1)
    target = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(finite, token, -1)


def check_token(token: Tensor) -> Tensor:
    """What `draw` returned, int64 ``[batch]`` on the CPU.

    Raises:
        NumericalError: it came from logits that are NaN or infinite.
    """
    if (token < 0).any():
        raise NumericalError("the model's logits are NaN or infinite while sampling; check the checkpoint.")
    return token


def _first_tokens(model: Any, uniform: Tensor, bos: int | str | None) -> Tensor:
    """BOS for every sequence, or a token at random where there is none; int64 ``[samples]``."""
    config = model.config.get_text_config()
    first = getattr(config, "bos_token_id", None) if bos == "config" else bos
    if isinstance(first, int) and 0 <= first < config.vocab_size:
        return torch.full(uniform.shape, first, dtype=torch.int64)
    tokens: Tensor = (uniform * config.vocab_size).long()
    return tokens

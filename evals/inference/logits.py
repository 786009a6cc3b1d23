"""Logits of a model a few positions at a time, so that ``[tokens, vocab]`` never exists for a whole segment.

The decoder runs once and gives its last hidden states. Then the model's *own* forward is run again on slices of them:
in a shallow copy of the model the decoder is replaced by a stand-in that returns the slice. Whatever the model does
between hidden states and logits (a tied head, soft-capping in Gemma 2, a logit scale in Cohere or Granite, a packed
head) happens as it always does and is written down nowhere here. At the start both ways are compared on a few tokens;
a model that does not fit this frame is run whole, and the result says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calib.model.cache import cache_argument, returned_cache

__all__ = ["LogitSource", "ModelLogits", "Run", "forward_logits", "model_device"]

_PROBE_TOKENS = 8
_CHUNK_ELEMENTS = {"cpu": 2**22}  # logits held at once: 16 MiB, which the allocator keeps; from 32 MiB on it does not
_DEVICE_CHUNK_ELEMENTS = 2**25


class LogitSource(Protocol):
    """What a metric reads from: a model, or one day the record of a model on disk."""

    notes: tuple[str, ...]

    def chunks(
        self, ids: Tensor, rows: int | None = None, *, scored: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Logits that predict ``ids[:, 1:]``, in order.

        Args:
            ids: int64 ``[batch, seqlen]`` on the CPU; what stands behind a sequence's end does not matter.
            rows: positions in a chunk; ``None`` chooses by the size of the vocabulary.
            scored: bool ``[batch, seqlen - 1]``, which of the targets are asked for; ``None`` for all.

        Yields:
            The chunk's place among the targets asked for (row by row), and its logits ``[rows, vocab]``.
        """
        ...


class Run:
    """One forward pass of a model, whose logits are made for chosen positions only.

    Args:
        output: what the decoder or the model returned.
        states: ``[positions, width]``, last hidden states or logits of all ``batch * seqlen`` positions.
        tail: from hidden states to logits; ``None`` if ``states`` are logits.
    """

    def __init__(self, output: Any, states: Tensor, tail: _Tail | None) -> None:
        self.cache = returned_cache(output)
        self._output, self._states, self._tail = output, states, tail

    def logits(self, positions: Tensor) -> Tensor:
        """``[rows, vocab]`` at ``positions [rows]`` of the flattened batch."""
        states = self._states[positions]
        return states if self._tail is None else self._tail(self._output, states)


class ModelLogits:
    """`LogitSource` of a torch causal language model.

    Args:
        model: anything that maps ``input_ids [batch, seqlen]`` to logits or to an object with ``logits``.
        probe: a few token ids ``[tokens]`` to compare the chunked way with the model's own.
    """

    def __init__(self, model: Any, probe: Tensor) -> None:
        self.model = model
        self.device = model_device(model)
        self.notes: tuple[str, ...] = ()
        self.vocab = 0
        self.two_steps: bool | None = None  # whether it can go on from its cache: `evals.tasks.loglikelihood` finds out
        self._tail = _tail(model)
        reason = self._disagreement(probe[:_PROBE_TOKENS])
        if reason is not None:
            self._tail = None
            self.notes = (f"{type(model).__name__}: logits of whole segments at once ({reason})",)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        dtype = getattr(self.model, "dtype", torch.float32)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def rows(self) -> int:
        """Positions whose logits are held at once."""
        return max(1, _CHUNK_ELEMENTS.get(self.device.type, _DEVICE_CHUNK_ELEMENTS) // max(1, self.vocab))

    @torch.no_grad()
    def run(self, ids: Tensor, *, cache: Any = None, **inputs: Any) -> Run:
        """Forward ``ids [batch, seqlen]`` behind what ``cache`` holds; ``inputs`` (mask, positions) go to the model."""
        ids = ids.to(self.device)
        if cache is not None:
            inputs |= cache_argument(self.model if self._tail is None else self.model.base_model, cache)
        if self._tail is None:
            if not inputs:
                logits = forward_logits(self.model, ids)
                return Run(None, logits.flatten(0, 1), None)
            output = self.model(input_ids=ids, **inputs)
            return Run(output, output.logits.flatten(0, 1), None)
        output = self.model.base_model(input_ids=ids, **({"use_cache": False} | inputs))
        return Run(output, output.last_hidden_state.flatten(0, 1), self._tail)

    @torch.no_grad()
    def chunks(
        self, ids: Tensor, rows: int | None = None, *, scored: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See `LogitSource.chunks`."""
        shown = ids[:, :-1]  # the last token is only predicted; a model of learned positions may have none for it
        places = torch.arange(shown.numel()).view(shown.shape)
        places = (places.flatten() if scored is None else places[scored]).to(self.device)
        run = self.run(shown)
        step = rows or self.rows
        for start in range(0, len(places), step):
            part = slice(start, min(start + step, len(places)))
            yield part, run.logits(places[part])

    @torch.no_grad()
    def _disagreement(self, probe: Tensor) -> str | None:
        """Why the chunked way cannot be used, or ``None``. Wrong wiring is far off, rounding is not."""
        ids = probe.to(self.device)[None]
        own = forward_logits(self.model, ids)[0].float()  # [tokens, vocab]
        self.vocab = own.shape[-1]
        if self._tail is None:
            return "it has no decoder below its head"
        try:
            output = self.model.base_model(input_ids=ids, use_cache=False)
            chunked = self._tail(output, output.last_hidden_state[0]).float()
        except (AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
            return f"its head cannot be run by itself: {type(error).__name__}"
        if chunked.shape != own.shape:
            return f"its head by itself gives shape {tuple(chunked.shape)}, not {tuple(own.shape)}"
        far = (chunked - own).abs().max() > 0.01 * own.abs().max()
        return "its head by itself gives other logits" if far else None


class _StandIn(nn.Module):
    """Takes the decoder's place and returns what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Tail:
    """The part of a model behind its decoder, as a function of hidden states."""

    def __init__(self, model: Any, decoder_name: str) -> None:
        self._stand_in = _StandIn()
        self._shell = copy.copy(model)  # shares every parameter; only its table of children is its own
        self._shell._modules = dict(model._modules) | {decoder_name: self._stand_in}
        self._shell.__dict__.pop("forward", None)  # a device hook's wrapper would call the original model

    def __call__(self, output: Any, hidden: Tensor) -> Tensor:
        """Logits ``[rows, vocab]`` of ``hidden [rows, width]``; ``output`` is what the decoder returned."""
        self._stand_in.output = type(output)(**{**output, "last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        try:
            return forward_logits(self._shell, ids)[0]
        finally:
            self._stand_in.output = None


def _tail(model: Any) -> _Tail | None:
    name = getattr(model, "base_model_prefix", "")
    decoder = getattr(model, "_modules", {}).get(name) if name else None
    return None if decoder is None or decoder is model else _Tail(model, name)


def forward_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[batch, seqlen, vocab]`` of a model's ordinary forward."""
    try:
        output = model(input_ids=ids, use_cache=False)
    except TypeError:  # a plain torch module knows neither name
        output = model(ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def model_device(model: Any) -> torch.device:
    """Where token ids must be to enter the model: the device of its embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    for tensor in (*embedding.parameters(), *embedding.buffers(), *model.parameters()):
        if tensor.device.type != "meta":
            return torch.device(tensor.device)
    return torch.device("cpu")

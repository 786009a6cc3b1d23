"""How the model itself calls its blocks: captured once, replayed with other hidden states.

The model's own forward runs with its blocks replaced by recorders that hand the hidden state through, so that masks,
positions and rotary tables are made by the model and not by us. What is captured does not depend on the weights of the
blocks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import ModelError
from calib.model.structure import foreign_code

__all__ = ["BlockCall", "capture_calls", "first_tensor", "own_state"]


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of one block, without the hidden state.

    Args:
        args: positional arguments after the hidden state.
        kwargs: keyword arguments; ``hidden_key`` is the one that carries the hidden state, if it is not positional.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_key: str | None = None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden state for ``hidden`` ``[sequences, tokens, width]``."""
        args, kwargs = self.arguments(hidden)
        return first_tensor(block(*args, **kwargs))

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All positional and keyword arguments of a call with ``hidden``."""
        if self.hidden_key is None:
            return (hidden, *self.args), dict(self.kwargs)
        return self.args, {**self.kwargs, self.hidden_key: hidden}


class _Done(Exception):
    """All blocks have been called: the rest of the model's forward is not needed."""


@dataclasses.dataclass
class _Recorder:
    """Stands in for the blocks during one forward of the model; returns the structure that a real block returns."""

    last: int
    output: Any  # what the first block returned when it was run
    calls: dict[int, BlockCall] = dataclasses.field(default_factory=dict)
    hidden: Tensor | None = None

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim == 3), None)
        if not args and key is None:
            raise ModelError("a block is called without a hidden state; this model is not one we can walk through.")
        hidden: Tensor = args[0] if args else kwargs[str(key)]
        if self.hidden is None:
            self.hidden = hidden.detach()
        rest = {k: v for k, v in kwargs.items() if k != key}
        self.calls[index] = BlockCall(tuple(args[1:]), rest, key)
        if index == self.last:
            raise _Done
        if isinstance(self.output, tuple | list):
            return type(self.output)([hidden, *self.output[1:]])
        return hidden


def capture_calls(
    model: nn.Module, block_names: list[str], batches: Iterator[Tensor], enter: Callable[[Tensor, Tensor], object]
) -> list[list[BlockCall]]:
    """Capture how the model calls its blocks on every batch.

    The first block must be loaded: it is run once, to see what blocks return.

    Args:
        model: the skeleton with everything but the blocks loaded (the head may be missing).
        block_names: names of the blocks, in order.
        batches: token ids int64 ``[sequences, tokens]``, on the model's device.
        enter: gets the hidden states that enter the first block, ``[sequences, tokens, width]``, and the batch.

    Returns:
        ``calls[batch][block]``; equal tensors are shared between batches.

    Raises:
        ModelError: the model does not call its blocks one after the other with a hidden state, or cannot be run.
    """
    blocks = [model.get_submodule(name) for name in block_names]
    calls, output = [], None
    pool: list[Tensor] = []
    for tokens in batches:
        with foreign_code(f"{type(model).__name__} cannot be walked block by block"):
            output = _probe(model, blocks, tokens[:1]) if output is None else output
            recorder = _Recorder(len(blocks) - 1, output)
            _run_recorded(model, blocks, recorder, tokens)
        if recorder.hidden is None or len(recorder.calls) != len(blocks):
            raise ModelError(f"{type(model).__name__} did not call all of its {len(blocks)} blocks.")
        calls.append([_shared(recorder.calls[i], pool) for i in range(len(blocks))])
        enter(recorder.hidden, tokens)
    return calls


def own_state(calls: list[BlockCall]) -> list[BlockCall]:
    """The calls of one batch with copies of everything that blocks can write to.

    Some models hand a table from block to block (Gemma 3n: keys and values that later blocks share). Each stream needs
    a table of its own, the same for all blocks.
    """
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor | str | int | float | bool | None):
            return value
        if isinstance(value, tuple):
            return tuple(copied(part) for part in value)
        if id(value) not in copies:
            copies[id(value)] = copy.deepcopy(value)
        return copies[id(value)]

    return [BlockCall(copied(c.args), {k: copied(v) for k, v in c.kwargs.items()}, c.hidden_key) for c in calls]


def _run_recorded(model: nn.Module, blocks: list[nn.Module], recorder: _Recorder, tokens: Tensor) -> None:
    def stand_in(index: int) -> Any:
        return lambda *args, **kwargs: recorder.record(index, args, kwargs)

    for index, block in enumerate(blocks):
        block.forward = stand_in(index)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Done:
        pass
    finally:
        for block in blocks:
            del block.forward


def _probe(model: nn.Module, blocks: list[nn.Module], tokens: Tensor) -> Any:
    """What a block returns; runs the first one for real on one sequence."""
    found: list[Any] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output)
        raise _Done

    handle = blocks[0].register_forward_hook(hook)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Done:
        pass
    finally:
        handle.remove()
    if not found:
        raise ModelError(f"{type(model).__name__} did not call its first block.")
    return found[0]


def _shared(call: BlockCall, pool: list[Tensor]) -> BlockCall:
    """The call with every tensor that equals one seen before replaced by that one."""

    def share(value: Any) -> Any:
        if isinstance(value, Tensor):
            for known in pool:
                if known is value or (
                    known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
                ):
                    return known
            pool.append(value)
            return value
        if isinstance(value, tuple):
            return tuple(share(part) for part in value)
        return value

    return BlockCall(share(call.args), {k: share(v) for k, v in call.kwargs.items()}, call.hidden_key)


def first_tensor(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor

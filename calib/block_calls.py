"""How the model itself calls its blocks: captured once, replayed with other hidden states.

The model's own forward runs with its blocks replaced by recorders that hand the hidden state through, so that masks,
positions and rotary tables are made by the model and not by us. What is captured does not depend on the weights of the
blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import ModelError

__all__ = ["BlockCall", "capture_calls"]


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
        if self.hidden_key is None:
            return first_tensor(block(hidden, *self.args, **self.kwargs))
        return first_tensor(block(*self.args, **self.kwargs, **{self.hidden_key: hidden}))


class _Done(Exception):
    """All blocks have been called: the rest of the model's forward is not needed."""


@dataclasses.dataclass
class _Recorder:
    """Stands in for the blocks during one forward of the model."""

    last: int
    calls: dict[int, BlockCall] = dataclasses.field(default_factory=dict)
    hidden: Tensor | None = None
    returns_tuple: bool = False

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
        return (hidden,) if self.returns_tuple else hidden


def capture_calls(
    model: nn.Module, block_names: list[str], batches: Iterator[Tensor]
) -> tuple[list[list[BlockCall]], list[Tensor]]:
    """Capture how the model calls its blocks on every batch.

    The first block must be loaded: it is run once, to see whether blocks return a tensor or a tuple.

    Args:
        model: the skeleton with everything but the blocks loaded (the head may be missing).
        block_names: names of the blocks, in order.
        batches: token ids int64 ``[sequences, tokens]``, on the model's device.

    Returns:
        ``calls[batch][block]`` (equal tensors are shared between batches) and the hidden states that enter the first
        block, ``[sequences, tokens, width]`` a batch.
    """
    blocks = [model.get_submodule(name) for name in block_names]
    returns_tuple: bool | None = None
    calls, hidden = [], []
    pool: list[Tensor] = []
    for tokens in batches:
        if returns_tuple is None:
            returns_tuple = _returns_tuple(model, blocks, tokens[:1])
        recorder = _Recorder(len(blocks) - 1, returns_tuple=returns_tuple)
        _run_recorded(model, blocks, recorder, tokens)
        if recorder.hidden is None or len(recorder.calls) != len(blocks):
            raise ModelError(f"{type(model).__name__} did not call all of its {len(blocks)} blocks.")
        calls.append([_shared(recorder.calls[i], pool) for i in range(len(blocks))])
        hidden.append(recorder.hidden)
    return calls, hidden


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


def _returns_tuple(model: nn.Module, blocks: list[nn.Module], tokens: Tensor) -> bool:
    """Whether blocks return a tuple; runs the first block for real on one sequence."""
    found: list[Any] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
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
    return bool(found[0])


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
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor

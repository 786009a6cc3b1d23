"""Gradients of a model's loss with one block in memory: forward block by block, then backward the same way.

The forward pass keeps what enters every block (an activation store: on the device, in memory or on disk). The backward
pass loads the blocks in reverse order, runs each again with gradients from its input on, and hands out what
second-order scores of a linear are made of: its inputs X and the gradients G of the loss by its outputs.

    passes = GradientPasses(source, tokens, ...)
    passes.forward()
    passes.sample_labels(generator)
    for block in passes.backward():              # from the last to the first
        for batch in block.batches():
            batch["mlp.down_proj"]               # [(X, G), ...] of every call

The loss is the sum over all tokens of the negative log-likelihood of labels *drawn from the model itself*,
independently at every position (or, with `text_labels`, of the text's own next tokens). Then the covariance of a
weight's gradient, sum_t g_t x_t^T of a sequence, is the Fisher matrix, which is the Hessian of the KL divergence from
the model. The gradient by the logits is ``softmax - onehot``, in closed form.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource
from calib.errors import ModelError, NumericalError
from calib.model.block_inputs import BlockCall, capture_calls, first_tensor, own_state
from calib.model.structure import find_blocks, find_linears, foreign_code
from calib.runner.activation_store import ActivationStore
from calib.runner.forward import check_finite, move_to

__all__ = ["BlockGradients", "GradientPasses", "LinearCalls", "NewStore", "Observer"]

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}

LinearCalls = dict[str, list[tuple[Tensor, Tensor]]]
"""By linear in a block: for every call its input ``[sequences, tokens, in]`` and the gradient of the loss by its output
``[sequences, tokens, out]`` (experts: ``[rows, in]`` and ``[rows, out]``)."""
NewStore = Callable[[str], ActivationStore]
"""An empty activation store of that name."""
Observer = Callable[[int, int, Tensor, Tensor], None]
"""Gets block, batch, and the hidden states before and after the block."""


class GradientPasses:
    """Forward and backward passes of one model over some tokens; see the head of this file.

    Args:
        source: the model.
        tokens: int64 ``[sequences, seqlen]``.
        device: where blocks are run.
        dtype: of the passes.
        new_store: makes the stores of hidden states.
        on_block: called after every block of either direction with its name.
        edit: called with a block's name and the loaded block, to give it other weights.
        edit_outside: called with the model whenever what lies outside the blocks is loaded, likewise.
        keep_all: keep what enters every block, for `backward`; otherwise only what leaves the last.
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        new_store: NewStore,
        on_block: Callable[[str], object] = lambda _: None,
        edit: Callable[[str, nn.Module], object] = lambda _, __: None,
        edit_outside: Callable[[nn.Module], object] = lambda _: None,
        keep_all: bool = True,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.on_block, self._edit, self._keep_all = on_block, edit, keep_all
        self._edit_outside = edit_outside
        self.block_names = find_blocks(source.skeleton)
        size = max(1, _BATCH_TOKENS.get(device.type, 4096) // tokens.shape[1])
        self.tokens = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        self._new_store = new_store
        self._entering: list[ActivationStore] = []  # by block
        self._leaving: ActivationStore | None = None  # the last block's outputs
        self._gradients: ActivationStore | None = None  # of the loss, by what left the block that is done next
        self._calls: list[list[BlockCall]] = []
        self._structure: Any = None  # what a block returns

    @property
    def token_count(self) -> int:
        """Tokens of all batches."""
        return sum(batch.numel() for batch in self.tokens)

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, observe: Observer | None = None) -> None:
        """Run all blocks and keep what enters each.

        Args:
            observe: sees hidden states before and after every block.

        Raises:
            ModelError: the model cannot be run block by block.
            NumericalError: a block's outputs hold NaN or Inf.
        """
        with torch.no_grad():
            self._capture()
            for index, name in enumerate(self.block_names):
                block = self._open(name)
                after = self._new_store(f"entering-{index + 1}")
                for number, batch in enumerate(self.tokens):
                    hidden = self._entering[index][number]
                    output = self._run(block, number, index, hidden)
                    check_finite(output, name)
                    after.append(output, (batch.shape[0], batch.shape[1]))
                    if observe is not None:
                        observe(index, number, hidden, output)
                self._close(name)
                if not self._keep_all:
                    self._entering[index].close()
                    self._entering[index] = self._new_store("empty")
                if index + 1 < len(self.block_names):
                    self._entering.append(after)
                else:
                    self._leaving = after
                self.on_block(name)

    def _capture(self) -> None:
        model, first = self.source.skeleton, self.block_names[0]
        needed = self._outside() | self._inside(first)
        self.source.load(needed)
        move_to(model, self.device, self.dtype)
        self._edit_outside(model)
        store = self._new_store("entering-0")

        def enter(hidden: Tensor, batch: Tensor) -> None:
            store.append(hidden, (batch.shape[0], batch.shape[1]))

        batches = (batch.to(self.device) for batch in self.tokens)
        self._calls = [own_state(calls) for calls in capture_calls(model, self.block_names, batches, enter)]
        self._entering = [store]
        self.source.release(needed)

    def _run(self, block: nn.Module, batch: int, index: int, hidden: Tensor) -> Tensor:
        """The block's output; what it returned is kept once, as the pattern of what blocks return."""
        args, kwargs = self._calls[batch][index].arguments(hidden)
        output = block(*args, **kwargs)
        if self._structure is None:
            self._structure = output
        return first_tensor(output)

    # -- from the last block to the loss -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """What comes after the blocks is loaded inside."""
        outside = self._outside()
        self.source.load(outside)
        move_to(self.source.skeleton, self.device, self.dtype)
        self._edit_outside(self.source.skeleton)
        try:
            yield
        finally:
            self.source.release(outside)

    def sequences(self) -> Iterator[tuple[int, int]]:
        """Every sequence as its batch and its place there."""
        for number, batch in enumerate(self.tokens):
            yield from ((number, sequence) for sequence in range(len(batch)))

    def logits(self, number: int, sequence: int) -> Tensor:
        """Logits of one sequence, float32 ``[tokens, vocabulary]``; call inside `head`, after `forward`."""
        with torch.no_grad():
            return self._after_blocks(number, sequence, self._last(number, sequence))[0].float()

    def logits_from(self, index: int, number: int) -> Iterator[Tensor]:
        """Logits ``[tokens, vocabulary]``, float32, of every sequence of a batch, with the weights that the model has
        now, from what entered a block; the blocks from there on and the head must be loaded (`ResidentSource`)."""
        with torch.no_grad():
            hidden = self._entering[index][number]
            for later in range(index, len(self.block_names)):
                block = self.source.skeleton.get_submodule(self.block_names[later])
                hidden = self._run(block, number, later, hidden)
            for sequence in range(len(hidden)):
                yield self._after_blocks(number, sequence, hidden[sequence : sequence + 1])[0].float()

    def _last(self, number: int, sequence: int) -> Tensor:
        assert self._leaving is not None, "forward() comes first"
        return self._leaving[number][sequence : sequence + 1]

    def _after_blocks(self, number: int, sequence: int, hidden: Tensor) -> Tensor:
        """The model's logits ``[1, tokens, vocabulary]`` where its last block gives ``hidden``."""
        model = self.source.skeleton
        tokens = self.tokens[number][sequence : sequence + 1].to(self.device)
        blocks = [model.get_submodule(name) for name in self.block_names]

        def stand_in(*_: Any, **__: Any) -> Any:
            if isinstance(self._structure, tuple | list):
                return type(self._structure)([hidden, *self._structure[1:]])
            return hidden

        for block in blocks:
            block.forward = stand_in
        try:
            with foreign_code(f"the head of {type(model).__name__} cannot be run by itself"):
                logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            for block in blocks:
                del block.forward
        return logits

    def sample_labels(self, generator: torch.Generator) -> None:
        """Draw a label at every position from the model, and begin the backward pass of their negative log-likelihood.

        Args:
            generator: on the CPU; the draw does not depend on the device.
        """

        self._begin_backward(generator)

    def text_labels(self) -> None:
        """Begin the backward pass of the negative log-likelihood of the text itself: every next token is a label."""
        self._begin_backward(None)

    def _begin_backward(self, generator: torch.Generator | None) -> None:
        self._gradients = self._new_store("gradients")
        with self.head():
            for number, batch in enumerate(self.tokens):
                rows = [self._label_gradient(number, sequence, generator) for sequence in range(len(batch))]
                self._gradients.append(torch.cat(rows), (batch.shape[0], batch.shape[1]))

    def _label_gradient(self, number: int, sequence: int, generator: torch.Generator | None) -> Tensor:
        """The gradient by the last block's output of one sequence; without a generator, of the text's own labels."""
        with torch.enable_grad():
            hidden = self._last(number, sequence).detach().requires_grad_()
            logits = self._after_blocks(number, sequence, hidden)
        gradient = torch.softmax(logits.detach()[0].float(), -1)
        if generator is None:
            label = self.tokens[number][sequence].roll(-1)[:, None].to(gradient.device)
        else:
            below = torch.rand(len(gradient), 1, generator=generator).to(gradient.device)
            label = torch.searchsorted(gradient.cumsum(-1), below).clamp_(max=gradient.shape[-1] - 1)
        gradient.scatter_add_(-1, label, torch.full_like(label, -1.0, dtype=gradient.dtype))
        if generator is None:
            gradient[-1] = 0  # no token of the text follows the last
        logits.backward(gradient[None].to(logits))  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return hidden.grad

    # -- backward ----------------------------------------------------------------------------------------------------

    def backward(self) -> Iterator[BlockGradients]:
        """Blocks from the last to the first. All batches of each must be taken (`BlockGradients.batches`)."""
        assert self._gradients is not None, "sample_labels() comes first"
        for index in reversed(range(len(self.block_names))):
            name = self.block_names[index]
            yield BlockGradients(self, index, name, self._open(name))
            self._close(name)
            self._entering[index].close()
            self.on_block(name)

    def batch_gradients(self, block: BlockGradients, number: int) -> LinearCalls:
        """One batch through one block; the gradient by the block's output gives way to that by its input."""
        assert self._gradients is not None
        recorder = _Recorder(block.linears)
        with torch.enable_grad(), recorder:
            hidden = self._entering[block.index][number].detach().requires_grad_()
            output = self._run(block.block, number, block.index, hidden)
            output.backward(self._gradients[number])  # type: ignore[no-untyped-call]
        if hidden.grad is None:
            raise ModelError(f"{block.name}: the output does not depend on the hidden state, so nothing can be scored.")
        if not bool(torch.isfinite(hidden.grad.sum(dtype=torch.float32))):
            raise NumericalError(
                f"{block.name}: the gradient holds NaN or Inf. Try --dtype float32; if that does not help the "
                f"checkpoint is damaged."
            )
        self._gradients[number] = hidden.grad
        return recorder.calls

    def close(self) -> None:
        """Remove the stores."""
        for store in (*self._entering, self._leaving, self._gradients):
            if store is not None:
                store.close()
        self._entering, self._leaving, self._gradients, self._calls = [], None, None, []

    # -- weights -----------------------------------------------------------------------------------------------------

    def _open(self, name: str) -> nn.Module:
        self.source.load(self._inside(name))
        block = self.source.skeleton.get_submodule(name)
        move_to(block, self.device, self.dtype)
        self._edit(name, block)
        return block

    def _close(self, name: str) -> None:
        self.source.release(self._inside(name))

    def _inside(self, name: str) -> frozenset[str]:
        return frozenset(tensor for tensor in self.source.tensor_names() if tensor.startswith(f"{name}."))

    def _outside(self) -> frozenset[str]:
        blocks = tuple(f"{name}." for name in self.block_names)
        return frozenset(tensor for tensor in self.source.tensor_names() if not tensor.startswith(blocks))


@dataclasses.dataclass(frozen=True)
class BlockGradients:
    """One block on the way back.

    Args:
        passes: where it comes from.
        index: its number.
        name: in the model.
        block: with its weights.
    """

    passes: GradientPasses
    index: int
    name: str
    block: nn.Module

    @property
    def linears(self) -> dict[str, nn.Module]:
        """By name in the block."""
        return find_linears(self.block)

    def batches(self) -> Iterator[LinearCalls]:
        """Inputs and output gradients of the block's linears, batch by batch."""
        for number in range(len(self.passes.tokens)):
            yield self.passes.batch_gradients(self, number)


class _Recorder:
    """Inside: notes inputs of linears on the way forward and gradients of their outputs on the way back."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self.calls: LinearCalls = {}
        self._linears, self._handles = linears, list[Any]()

    def __enter__(self) -> _Recorder:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()

            def note(gradient: Tensor) -> None:
                self.calls.setdefault(name, []).append((inputs, gradient.detach()))

            if output.requires_grad:
                output.register_hook(note)  # type: ignore[no-untyped-call]

        return hook

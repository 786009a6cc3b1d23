"""One optimizer step: forward, backward, move. On a GPU it runs as one CUDA graph where the window allows it.

The kernels of a step are small next to the time that it takes to launch them, above all for models of a few hundred
million parameters. A graph launches all of them at once. It needs the same shapes and the same call arguments for every
batch, and no decision that depends on data (routed experts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calib.model.experts import expert_lists
from calib.runner.activation_store import ActivationStore
from calib.runner.runner import BlockWindow
from ptq.learning.block import BlockLearner, window_tensors
from ptq.learning.config import LearnedConfig
from ptq.learning.losses import output_loss
from ptq.learning.optimizer import Optimizer

__all__ = ["Stepper", "make_stepper"]

_WARM_UP = 2  # steps before a capture: libraries and the optimizer set themselves up at first use
_SOFT_WEIGHT, _SOFT_START, _SOFT_END, _SOFT_WARM_UP = 0.01, 20.0, 2.0, 0.2  # of soft rounding's regularizer (BRECQ)


class Stepper:
    """Steps one after another, every kernel launched by itself.

    Args:
        window: the window; blocks: its learners; config: loss and accumulation.
        optimizer: moves ``parameters``.
    """

    captured = False
    corner = 1.0  # of the Huber loss

    def __init__(
        self,
        window: BlockWindow,
        blocks: Sequence[BlockLearner],
        config: LearnedConfig,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
    ) -> None:
        self.window, self.blocks, self.config = window, blocks, config
        self.optimizer, self.parameters = optimizer, list(parameters)
        runner = window.runner
        tokens = math.prod(runner.activations(full=False).shapes[0])
        self._flops = tokens * sum(runner.map_of(block).flops for block in window.blocks)
        self._best = _Best(self.parameters) if config.keep == "best" else None
        self._batch_loss = torch.zeros((), device=runner.device)  # of the step that is being made
        self.total = torch.zeros((), device=runner.device)  # of losses: not finite as soon as one is not

    def step(self, batches: Sequence[int], following: int, targets: ActivationStore, progress: float) -> None:
        """One step on some batches.

        Args:
            following: the first batch of the next step, to be fetched meanwhile; progress: 0 at the first step to 1.
        """
        runner, sums = self.window.runner, None
        for number, batch in enumerate(batches):
            then = batches[number + 1] if number + 1 < len(batches) else following
            hidden = runner.activations(full=False).fetch(batch, then)
            gradients = self.gradients(batch, hidden, targets.fetch(batch, then), progress)
            sums = gradients if sums is None else [_sum(a, b) for a, b in zip(sums, gradients, strict=True)]
        assert sums is not None
        if self._best is not None and runner.workers.size > 1:  # all processes must keep the same step
            loss = self._batch_loss.to(runner.workers.device)
            runner.workers.sum_(loss)
            self._batch_loss.copy_(loss)
        self._move(self._of_all_processes(sums, len(batches)))
        self._count(len(batches))

    def _move(self, gradients: Sequence[Tensor | None]) -> None:
        if self._best is not None:
            self._best.note(self._batch_loss, self.parameters)
        self._batch_loss.zero_()
        self.optimizer.step(gradients)
        for one in self.blocks:
            one.keep_inside()

    def _count(self, batches: int) -> None:
        """Note the work of a step: a forward pass, and a backward pass that costs twice as much."""
        flops = self.window.runner.flops
        flops["learning"] = flops.get("learning", 0.0) + 3 * batches * self._flops

    def gradients(self, batch: int, hidden: Tensor, target: Tensor, progress: float) -> list[Tensor | None]:
        """Gradients of the loss of one batch; ``None`` for what it does not depend on (experts without tokens)."""
        runner = self.window.runner
        with torch.enable_grad():
            for one, tensors in zip(self.blocks, window_tensors(self.blocks), strict=True):
                hidden = one.run(runner.call(batch, one.context.index, full=False), hidden, tensors)
            loss = output_loss(hidden, target, self.config.loss, self.corner)
            self.total += loss.detach()
            self._batch_loss += loss.detach()
            loss = self._regularized(loss, progress)
            return list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def _regularized(self, loss: Tensor, progress: float) -> Tensor:
        if self.config.rounding != "soft" or progress < _SOFT_WARM_UP:
            return loss
        left = 1 - (progress - _SOFT_WARM_UP) / (1 - _SOFT_WARM_UP)
        terms = [one.regularizer(_SOFT_END + (_SOFT_START - _SOFT_END) * left) for one in self.blocks]
        weights = sum(linear.base.numel() for one in self.blocks for linear in one.linears.values())
        total = torch.stack([term for term in terms if term is not None]).sum()
        # Relative to the loss itself: the output's scale differs by orders of magnitude from block to block.
        return loss + _SOFT_WEIGHT * 100 * loss.detach() * total / weights

    def _of_all_processes(self, gradients: list[Tensor | None], batches: int) -> list[Tensor | None]:
        """The mean over batches and processes."""
        workers = self.window.runner.workers
        if workers.size > 1:
            full = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
            flat = torch.cat([gradient.flatten() for gradient in full]).to(workers.device)
            workers.sum_(flat)
            parts = flat.to(self.parameters[0].device).split_with_sizes([p.numel() for p in self.parameters])
            gradients = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        count = batches * workers.size
        return gradients if count == 1 else [None if g is None else g / count for g in gradients]

    def keep(self) -> None:
        """Go back to the best step, if that is what is kept."""
        if self._best is not None:
            self._best.restore(self.parameters)

    def finite(self) -> bool:
        """Whether all losses so far were finite, on every process."""
        total = self.total.double().reshape(1).to(self.window.runner.workers.device)
        self.window.runner.workers.sum_(total)
        return bool(torch.isfinite(total))


class GraphStepper(Stepper):
    """Steps as one CUDA graph."""

    captured = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        runner = self.window.runner
        self._hidden = runner.hidden(0, full=False).clone()
        self._target: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, batches: Sequence[int], following: int, targets: ActivationStore, progress: float) -> None:
        batch = batches[0]
        target = targets.fetch(batch, following)
        self._hidden.copy_(self.window.runner.activations(full=False).fetch(batch, following))
        if self._target is None:
            self._target = target.clone()
        self._target.copy_(target)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        self._count(1)

    def _once(self) -> None:
        assert self._target is not None
        self._move(self.gradients(0, self._hidden, self._target, 0.0))

    def _capture(self) -> None:
        """Run a few steps for real, undo them, and record one."""
        saved = [parameter.detach().clone() for parameter in self.parameters]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._once()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
        self.optimizer.reset()
        self.total.zero_()
        if self._best is not None:
            self._best.reset(self.parameters)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._once()
        self._graph = graph


class _Best:
    """The parameters of the step with the smallest loss; every operation can be part of a graph."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._values = [parameter.detach().clone() for parameter in parameters]
        self._loss = torch.full((), math.inf, device=parameters[0].device)

    @torch.no_grad()
    def note(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """``parameters`` gave ``loss``."""
        better = loss < self._loss
        for value, parameter in zip(self._values, parameters, strict=True):
            torch.where(better, parameter, value, out=value)
        self._loss.copy_(torch.where(better, loss, self._loss))

    @torch.no_grad()
    def reset(self, parameters: Sequence[Tensor]) -> None:
        """Forget all steps."""
        self._loss.fill_(math.inf)
        torch._foreach_copy_(self._values, list(parameters))

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Give ``parameters`` their best values."""
        torch._foreach_copy_(list(parameters), self._values)


def make_stepper(
    window: BlockWindow,
    blocks: Sequence[BlockLearner],
    config: LearnedConfig,
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
) -> Stepper:
    """The fastest stepper that this window allows."""
    kind = GraphStepper if _can_capture(window, blocks, config) else Stepper
    return kind(window, blocks, config, optimizer, parameters)


def _can_capture(window: BlockWindow, blocks: Sequence[BlockLearner], config: LearnedConfig) -> bool:
    runner = window.runner
    if runner.device.type != "cuda" or runner.workers.size > 1 or config.grad_accum > 1 or config.rounding == "soft":
        return False
    if any(expert_lists(one.context.block) for one in blocks):
        return False
    shapes = runner.activations(full=False).shapes
    return len({shapes[batch] for batch in runner.fitted_batches}) == 1 and all(
        _same(runner.call(batch, one.context.index, full=False), runner.call(0, one.context.index, full=False))
        for batch in runner.fitted_batches
        for one in blocks
    )


def _same(call: Any, first: Any) -> bool:
    """Whether two calls have the same arguments: the same tensors, equal plain values."""
    return _equal((call.args, dict(call.kwargs)), (first.args, dict(first.kwargs)))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return isinstance(a, str | int | float | bool) and type(a) is type(b) and a == b


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b

"""The loop: one window of blocks, trained so that its output is the full-precision model's.

The student is fed with the quantized stream, the teacher with the full-precision stream; targets are computed once a
window. The order of batches is drawn from the seed, the sweep and the window, so a resumed run learns the same.

Sequences that are held out decide: their loss is taken before the first step and several times on the way, the state
with the lowest one is what is learned, and steps end early where it no longer falls. A state counts only where their
squared error is not above the start's either: a loss relative to every token's energy falls while the few tokens with
huge activations get worse, which all later blocks attend to. If no state was better than the start, or if a loss was
not finite, everything is put back, tried once more at a quarter of the rates, and reported. Where nothing is held out,
the losses over all that is learned on take their place at the end of the steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.runner.activation_store import ActivationStore
from calib.runner.runner import BlockWindow
from ptq.errors import NumericalError, UsageError
from ptq.learning.block import BlockLearner, window_tensors
from ptq.learning.config import LearnedConfig
from ptq.learning.losses import Losses, output_loss
from ptq.learning.optimizer import Optimizer, decayed
from ptq.learning.stepper import make_stepper

__all__ = ["WindowRecord", "train_window"]

_RATES = (1.0, 0.25)  # of learning rates: a window that learned nothing good tries once more
_TOLD = {1.0: "the rates that were asked for", 0.25: "a quarter of the rates"}
_CHECKS = 10  # of the held-out loss, in the steps of a stage
_PATIENCE = 3  # checks without a new lowest held-out loss that end a stage
_LOOK_EVERY = 64  # steps between looks at the losses where nothing is held out: on a GPU each waits for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRecord:
    """What one stage of one window did.

    Args:
        sweep, window: Numbers.
        start, stop: Blocks ``start .. stop - 1``.
        share: Of the input channels quantized.
        init: Methods that the blocks started from.
        loss_before, loss_after: Over the sequences that are held out (all, if none are), before and after; what was
            kept is the smaller one's.
        accepted: Whether what was learned was kept; else the window is as it was before, to the bit.
        held_out: Sequences that are held out.
        steps: Of the optimizer that were made, of the last attempt.
        planned: Steps at most.
        seconds: Of the whole stage.
        captured: Whether steps ran as one CUDA graph.
        notes: What a reader must know (put back, not lowered).
    """

    sweep: int
    window: int
    start: int
    stop: int
    share: float
    init: tuple[str, ...]
    loss_before: float
    loss_after: float
    accepted: bool
    held_out: int
    steps: int
    planned: int
    seconds: float
    captured: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"notes": list(self.notes), "init": list(self.init)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> WindowRecord:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        return cls(**(row | {"notes": tuple(row["notes"]), "init": tuple(row["init"])}))


def train_window(
    window: BlockWindow,
    blocks: Sequence[BlockLearner],
    config: LearnedConfig,
    *,
    sweep: int,
    shares: Sequence[float],
    steps: int,
    seed: int,
    on_progress: Callable[[int, int], object] = lambda done, steps: None,
) -> list[WindowRecord]:
    """Train what ``blocks`` hold, in place; a record a stage.

    Args:
        window: the window; blocks: a learner a block.
        sweep: its number; shares: of the input channels that are quantized, a stage each.
        steps: of the optimizer a stage; seed: of the order of batches.
        on_progress: called now and then with the steps done and to do, over all stages.

    Raises:
        UsageError: nothing can be learned here.
        NumericalError: the loss is not finite before anything is learned.
    """
    if not any(one.linears for one in blocks):
        return []  # all of it stays in full precision
    if not any(one.parameters() for one in blocks):
        raise UsageError(
            f"{window.blocks[0].name}: nothing is left to learn: lora_rank is 0, clip off, rounding nearest, and no "
            f"channels are scaled here. Turn one of them on."
        )
    runner = window.runner
    targets = runner.new_store(f"targets-{sweep}-{window.number}")
    try:
        with runner.timing.part("passes", runner.device):
            for batch in runner.batches:
                targets.append(window.run(batch, full=True), runner.activations(full=True).shapes[batch])
        for one in blocks:
            one.context.use(full=False)
        stage = _Stage(window, blocks, config, targets, sweep, seed)
        return [
            stage.train(share, number, steps, lambda done, n=number: on_progress(n * steps + done, len(shares) * steps))  # type: ignore[misc]
            for number, share in enumerate(shares)
        ]
    finally:
        targets.close()


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What an attempt ended with: the lowest loss of a state that counts, infinite if none does; the steps it took,
    whether they ran as a graph, and why none counts (empty where a loss was not finite)."""

    loss: float
    steps: int
    captured: bool
    lost: str


class _Lowest:
    """The parameters with the lowest loss so far, of those that are better than the start.

    Args:
        parameters: what is learned.
        start: its losses before the first step.
    """

    def __init__(self, parameters: Sequence[Tensor], start: Losses) -> None:
        self._values = [torch.empty_like(parameter) for parameter in parameters]
        self._start, self._seen = start, math.inf
        self.loss, self.age = math.inf, 0

    @torch.no_grad()
    def note(self, losses: Losses, parameters: Sequence[Tensor]) -> None:
        """``parameters`` have these losses; ``age`` counts states since the loss was lowest."""
        self.age += 1
        if losses.loss < self._seen:
            self._seen, self.age = losses.loss, 0
        if losses.loss < self.loss and losses.better_than(self._start):
            self.loss = losses.loss
            torch._foreach_copy_(self._values, list(parameters))

    def why_none(self) -> str:
        """Why no state counts."""
        lower = self._seen < self._start.loss
        return "was lowered only at a larger squared error" if lower else "was not lowered"

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Give ``parameters`` these values; nothing if no state was better than the start."""
        if math.isfinite(self.loss):
            torch._foreach_copy_(list(parameters), self._values)


class _Stage:
    """One window's training at one share after the other."""

    def __init__(
        self,
        window: BlockWindow,
        blocks: Sequence[BlockLearner],
        config: LearnedConfig,
        targets: ActivationStore,
        sweep: int,
        seed: int,
    ) -> None:
        self.window, self.blocks, self.config, self.targets = window, blocks, config, targets
        self.sweep, self.seed = sweep, seed
        self.corner = 1.0
        runner = window.runner
        shapes = runner.activations(full=False).shapes
        held = torch.tensor([sum(shapes[batch][0] for batch in runner.held_out_batches)], dtype=torch.float64)
        held = held.to(runner.workers.device)
        runner.workers.sum_(held)
        self._held_out = int(held)
        self._data = f"over the {self._held_out} sequences held out" if self._held_out else "over all calibration data"

    def train(self, share: float, number: int, steps: int, on_progress: Callable[[int], object]) -> WindowRecord:
        start, runner = time.perf_counter(), self.window.runner
        for one in self.blocks:
            one.share = share
        with runner.timing.part("learning", runner.device):
            if self.config.loss == "huber":  # fixed, so that losses can be compared
                self.corner = max(1e-30, 2 * self._means(_absolute)[0])
            before, saved = self._losses(), [one.state() for one in self.blocks]
            if not math.isfinite(before.loss):
                raise NumericalError(
                    f"the loss of {self.window.blocks[0].name} and what follows in its window is {before.loss} before "
                    f"anything is learned. Try --dtype float32; if that does not help the checkpoint is damaged."
                )
            notes: tuple[str, ...] = ()
            for slower in _RATES:
                tried = self._steps(number, steps, slower, before, on_progress)
                if tried.loss < before.loss:
                    break
                for one, state in zip(self.blocks, saved, strict=True):
                    one.load(state)
                lost = tried.lost or f"was not finite after {tried.steps} steps"
                notes += (f"the loss {self._data} {lost} with {_TOLD[slower]}: put back",)
        span, accepted = self.window.span, tried.loss < before.loss
        return WindowRecord(
            sweep=self.sweep,
            window=self.window.number,
            start=span.start,
            stop=span.stop,
            share=share,
            init=tuple(one.init for one in self.blocks),
            loss_before=before.loss,
            loss_after=tried.loss if accepted else before.loss,  # to the bit: it is a function of the state
            accepted=accepted,
            held_out=self._held_out,
            steps=tried.steps,
            planned=steps,
            seconds=time.perf_counter() - start,
            captured=tried.captured,
            notes=notes,
        )

    def _losses(self) -> Losses:
        """Over the sequences that decide, of all processes."""

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return output_loss(output, target, self.config.loss, self.corner)

        return Losses(*self._means(loss, lambda output, target: output_loss(output, target, "mse")))

    @torch.no_grad()
    def _means(self, *measures: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        """The means of measures of the student's and the teacher's output, over the sequences that decide."""
        runner = self.window.runner
        total = torch.zeros(len(measures) + 1, dtype=torch.float64, device=runner.device)
        tensors = window_tensors(self.blocks, hard=True)
        for batch in runner.held_out_batches if self._held_out else runner.fitted_batches:
            hidden = runner.hidden(batch, full=False)
            for one, given in zip(self.blocks, tensors, strict=True):
                hidden = one.run(runner.call(batch, one.context.index, full=False), hidden, given)
            sequences = runner.activations(full=False).shapes[batch][0]
            target = self.targets[batch]
            total[:-1] += torch.stack([measure(hidden, target).double() for measure in measures]) * sequences
            total[-1] += sequences
        total = total.to(runner.workers.device)
        runner.workers.sum_(total)
        return [float(value) for value in total[:-1] / total[-1]]

    def _steps(
        self, number: int, steps: int, slower: float, start: Losses, on_progress: Callable[[int], object]
    ) -> _Attempt:
        """Learn, with ``slower`` times the rates; the blocks end in the state with the loss that is returned."""
        runner, accum = self.window.runner, self.config.grad_accum
        rates = {
            f"{i}:{name}": (value, slower * one.rate_of(name, steps))
            for i, one in enumerate(self.blocks)
            for name, value in one.parameters().items()
        }
        parameters = [value for value, _ in rates.values()]
        optimizer = Optimizer(rates, self.config)
        stepper = make_stepper(self.window, self.blocks, self.config, optimizer, parameters)
        stepper.corner = self.corner
        order = _order(len(runner.fitted_batches), steps * accum, self._generator(number))
        lowest, every = _Lowest(parameters, start), max(1, steps // _CHECKS) if self._held_out else _LOOK_EVERY
        for step in range(steps):
            optimizer.set_decay(decayed(self.config, step, steps))
            chosen = order[step * accum : (step + 1) * accum]
            stepper.step(chosen, order[(step + 1) * accum % len(order)], self.targets, step / max(1, steps - 1))
            if (step + 1) % every and step + 1 < steps:
                continue
            on_progress(step + 1)
            if not stepper.finite():
                return _Attempt(math.inf, step + 1, stepper.captured, lost="")
            if self._held_out and step + 1 < steps:
                lowest.note(self._losses(), parameters)
                if lowest.age == _PATIENCE:
                    break
        if lowest.age < _PATIENCE:
            stepper.keep()
            lowest.note(self._losses(), parameters)
        lowest.restore(parameters)
        return _Attempt(lowest.loss, step + 1, stepper.captured, lowest.why_none())

    def _generator(self, number: int) -> torch.Generator:
        mixed = (self.seed * 1009 + self.sweep) * 1009 + self.window.number
        return torch.Generator().manual_seed((mixed * 1009 + number) % 2**63)


def _absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).abs().mean()


def _order(batches: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` numbers of batches: every batch once an epoch, in an order of its own."""
    epochs = -(-count // batches)
    drawn = torch.cat([torch.randperm(batches, generator=generator) for _ in range(epochs)])
    return [int(number) for number in drawn[:count]]

"""The loop: one window of blocks, trained so that its output is the full-precision model's.

The student is fed with the quantized stream, the teacher with the full-precision stream; targets are computed once a
window. The order of batches is drawn from the seed, the sweep and the window, so a resumed run learns the same. What
is learned is kept only if it lowered the loss over all calibration data; if not, or if a loss was not finite,
everything is put back, tried once more at a quarter of the rates, and reported.
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
from ptq.learning.losses import output_loss
from ptq.learning.optimizer import Optimizer, decayed
from ptq.learning.stepper import make_stepper

__all__ = ["WindowRecord", "train_window"]

_RATES = (1.0, 0.25)  # of learning rates: a window that learned nothing good tries once more
_TOLD = {1.0: "the rates that were asked for", 0.25: "a quarter of the rates"}
_CHECK_EVERY = 64  # steps between looks at the loss: on a GPU each waits for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRecord:
    """What one stage of one window did.

    Args:
        sweep, window: numbers; start, stop: blocks ``start .. stop - 1``; share: of the input channels quantized.
        loss_before, loss_after: over all calibration data, before and after; what was kept is the smaller one's.
        steps: of the optimizer; seconds: of the whole stage; captured: steps ran as one CUDA graph.
        notes: what a reader must know (put back, not lowered).
    """

    sweep: int
    window: int
    start: int
    stop: int
    share: float
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    captured: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"notes": list(self.notes)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> WindowRecord:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        return cls(**(row | {"notes": tuple(row["notes"])}))


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

    def train(self, share: float, number: int, steps: int, on_progress: Callable[[int], object]) -> WindowRecord:
        start, runner = time.perf_counter(), self.window.runner
        for one in self.blocks:
            one.share = share
        with runner.timing.part("learning", runner.device):
            if self.config.loss == "huber":  # fixed, so that losses can be compared
                self.corner = max(1e-30, 2 * self._mean(_absolute))
            before, saved = self._loss(), [one.state() for one in self.blocks]
            if not math.isfinite(before):
                raise NumericalError(
                    f"the loss of {self.window.blocks[0].name} and what follows in its window is {before} before "
                    f"anything is learned. Try --dtype float32; if that does not help the checkpoint is damaged."
                )
            notes: tuple[str, ...] = ()
            for slower in _RATES:
                done, finite, captured = self._steps(number, steps, slower, on_progress)
                after = self._loss() if finite else math.inf
                if after <= before:
                    break
                finite_end = math.isfinite(after)
                for one, state in zip(self.blocks, saved, strict=True):
                    one.load(state)
                after = before  # to the bit: it is a function of the state
                found = "was not lowered" if finite_end else f"was not finite after {done} steps"
                notes += (f"the loss over all calibration data {found} with {_TOLD[slower]}: put back",)
        span = self.window.span
        seconds = time.perf_counter() - start
        return WindowRecord(
            sweep=self.sweep,
            window=self.window.number,
            start=span.start,
            stop=span.stop,
            share=share,
            loss_before=before,
            loss_after=after,
            steps=done,
            seconds=seconds,
            captured=captured,
            notes=notes,
        )

    def _loss(self) -> float:
        """Over all calibration data of all processes."""
        return self._mean(lambda output, target: output_loss(output, target, self.config.loss, self.corner))

    @torch.no_grad()
    def _mean(self, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
        """The mean of a measure of the student's and the teacher's output, over all sequences of all processes."""
        runner = self.window.runner
        total = torch.zeros(2, dtype=torch.float64, device=runner.device)
        tensors = window_tensors(self.blocks, hard=True)
        for batch in runner.batches:
            hidden = runner.hidden(batch, full=False)
            for one, given in zip(self.blocks, tensors, strict=True):
                hidden = one.run(runner.call(batch, one.context.index, full=False), hidden, given)
            sequences = runner.activations(full=False).shapes[batch][0]
            total[0] += measure(hidden, self.targets[batch]).double() * sequences
            total[1] += sequences
        total = total.to(runner.workers.device)
        runner.workers.sum_(total)
        return float(total[0] / total[1])

    def _steps(
        self, number: int, steps: int, slower: float, on_progress: Callable[[int], object]
    ) -> tuple[int, bool, bool]:
        """Steps done, whether losses stayed finite, whether they ran as a graph; rates are ``slower`` times theirs."""
        runner = self.window.runner
        rates = {
            f"{i}:{name}": (value, slower * one.rate_of(name, steps))
            for i, one in enumerate(self.blocks)
            for name, value in one.parameters().items()
        }
        optimizer = Optimizer(rates, self.config)
        stepper = make_stepper(self.window, self.blocks, self.config, optimizer, [t for t, _ in rates.values()])
        stepper.corner = self.corner
        order = _order(len(runner.batches), steps * self.config.grad_accum, self._generator(number))
        for step in range(steps):
            optimizer.set_decay(decayed(self.config, step, steps))
            chosen = order[step * self.config.grad_accum : (step + 1) * self.config.grad_accum]
            following = order[(step + 1) * self.config.grad_accum % len(order)]
            progress = step / max(1, steps - 1)
            stepper.step(chosen, following, self.targets, progress)
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == steps:
                if not stepper.finite():
                    return step + 1, False, stepper.captured
                on_progress(step + 1)
        stepper.keep()
        return steps, True, stepper.captured

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

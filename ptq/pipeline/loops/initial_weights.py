"""What the blocks of a learned run start from: a layer-wise method's result, made when a window reaches the block.

The method sees what the learned blocks before it make of the data, and not what its own results would have made of it:
corrections of errors that learning has removed would be errors themselves. Where the choice is ours (``init=auto``),
nearest rounding takes its place in blocks where it has the smaller loss on the sequences that are held out, and no
larger squared error, as it has where the statistics are of too few tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from calib.runner.block import BlockContext
from calib.runner.runner import BlockWindow
from ptq.checkpoint.workspace import Workspace
from ptq.containers.native import NATIVE
from ptq.learning.config import LearnedConfig
from ptq.learning.losses import Losses, output_loss
from ptq.pipeline.costs import Costs
from ptq.pipeline.events import ignore_events
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.loops.layerwise import BlockSolver
from ptq.pipeline.preparation.method_setup import LayerSolver
from ptq.quantized import QuantizedWeight
from ptq.report import PartRecord

__all__ = ["InitialWeights"]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A method's result for a block, and the losses that the block has with it on the sequences held out."""

    method: str
    weights: dict[str, QuantizedWeight]
    losses: Losses


class InitialWeights:
    """Starting points of blocks, kept in the workspace.

    Args:
        job: The run.
        config: What is learned.
        costs: Its clock.
        inputs: What is done to the inputs of linears.
        work: The workspace.
    """

    def __init__(self, job: Job, config: LearnedConfig, costs: Costs, inputs: QuantizedInputs, work: Workspace) -> None:
        self._job, self._config, self._costs, self._inputs, self._work = job, config, costs, inputs, work
        self._made = {name for name in job.workers.broadcast_object(work.names()) if name.startswith("init-")}

    def of(
        self, window: BlockWindow, context: BlockContext, settle: Callable[[BlockContext], object]
    ) -> tuple[dict[str, QuantizedWeight], str]:
        """A block's starting point by linear, and the method that made it; nothing and ``none`` without one.

        Args:
            window: The window that reaches the block.
            context: The block.
            settle: Puts into a block of the window what it has learned.
        """
        solver = self._job.method.solver
        if self._config.init == "none" or solver is None:
            return {}, "none"
        name = f"init-{context.index:05d}"
        if name not in self._made:
            self._save(name, context, self._make(window, context, solver, settle))
        payload, tensors = self._work.payload(name), self._work.load(name)
        schemes = self._job.assignment.in_block(context.name)
        shapes = {
            linear: (context.full(linear).shape[0], context.full(linear).shape[1]) for linear in payload["linears"]
        }
        read = {linear: NATIVE.read_layer(linear, tensors, schemes[linear], shape) for linear, shape in shapes.items()}
        return read, str(payload["method"])

    def _save(self, name: str, context: BlockContext, made: _Candidate) -> None:
        tensors: dict[str, Tensor] = {}
        for linear, weight in made.weights.items():
            tensors.update(weight.tensors(linear))
        payload = {"block": context.name, "linears": sorted(made.weights), "method": made.method}
        self._work.save(name, tensors, payload)
        self._job.workers.broadcast_object(None)  # the file is there for all
        self._made.add(name)

    def _make(
        self,
        window: BlockWindow,
        context: BlockContext,
        solver: LayerSolver,
        settle: Callable[[BlockContext], object],
    ) -> _Candidate:
        before = [block for block in window.blocks if block.index < context.index]
        for block in before:
            settle(block)
        with window.runner.ahead(before):
            made = self._candidate(self._job, context, solver)
            other = self._job.method.fallback
            if other is None or made.losses.loss == 0:
                return made
            # Reads no statistics: what the first candidate has left in the block does not matter to it.
            quiet = dataclasses.replace(self._job, listener=ignore_events)
            nearest = self._candidate(quiet, context, other)
        if not nearest.losses.better_than(made.losses):
            return made
        self._job.emit(
            f"{context.name} starts from {nearest.method}: its loss over the sequences held out is "
            f"{nearest.losses.loss:.3g}, that of {made.method} {made.losses.loss:.3g}"
        )
        return nearest

    def _candidate(self, job: Job, context: BlockContext, solver: LayerSolver) -> _Candidate:
        weights = dict(BlockSolver(job, solver, self._costs, self._inputs).solve(context, PartRecord()))
        context.drop_passes()
        for linear, weight in weights.items():
            context.replace(linear, weight.dequantize(job.dtype))
        losses = self._losses(context) if job.method.fallback is not None else Losses(0.0, 0.0)
        context.remove_input_transforms()
        return _Candidate(solver.method.name, weights, losses)

    def _losses(self, context: BlockContext) -> Losses:
        """The block's over the sequences held out, of all processes; 0 if there are none."""
        runner = context.runner
        total = torch.zeros(3, dtype=torch.float64, device=runner.device)
        for batch in runner.held_out_batches:
            target = context.run(batch, runner.hidden(batch, full=True), full=True)
            output = context.run(batch, runner.hidden(batch, full=False), full=False)
            sequences = runner.activations(full=False).shapes[batch][0]
            # Never the Huber loss, whose corner belongs to a window.
            kind = "mse" if self._config.loss == "huber" else self._config.loss
            for number, measure in enumerate((kind, "mse")):
                total[number] += output_loss(output, target, measure).double() * sequences
            total[-1] += sequences
        total = total.to(runner.workers.device)
        runner.workers.sum_(total)
        return Losses(*(float(value) for value in total[:-1] / total[-1].clamp(min=1)))

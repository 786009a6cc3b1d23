"""The loop of methods that learn over windows of blocks: sweeps through the model, resumed window by window.

A sweep is one pass through the model. A block that a window reaches for the first time gets its starting point, with
``init``: a layer-wise method quantizes it for the inputs that it has at that moment, behind what the blocks before it
have learned by then. After a window what its blocks have learned is stored in the workspace; a block that leaves a
window for the last time in the last sweep is folded, packed and written. A resumed run skips what is stored: the
streams pass through the blocks again, with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from calib.runner.block import BlockContext
from calib.runner.runner import BlockWindow
from calib.runner.window_schedule import Window, describe_windows
from ptq.checkpoint.workspace import WORK, Workspace
from ptq.learning.block import BlockLearner
from ptq.learning.config import LearnedConfig
from ptq.learning.split import split_sequences
from ptq.learning.training import WindowRecord, train_window
from ptq.pipeline.costs import Costs
from ptq.pipeline.events import Event
from ptq.pipeline.inputs.input_transforms import stored_scheme
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.loops.initial_weights import InitialWeights
from ptq.pipeline.loops.layerwise import called_schemes
from ptq.pipeline.loops.window_scalings import WindowScalings
from ptq.pipeline.loops.window_states import WindowStates
from ptq.pipeline.output.block_writer import BlockWriter
from ptq.quantized import QuantizedWeight
from ptq.report import LayerRecord, PartRecord
from ptq.scheme import MAX_BITS

__all__ = ["WindowedLoop", "run_windowed"]


def run_windowed(job: Job, config: LearnedConfig, costs: Costs, inputs: QuantizedInputs, blocks: BlockWriter) -> None:
    """Learn in all windows, and write every block.

    Args:
        job: The run.
        config: What is learned.
        costs: Its clock.
        inputs: What is done to the inputs of linears.
        blocks: Where results go.
    """
    if not blocks.finished.keys() >= set(job.blocks):
        WindowedLoop(job, config, costs, inputs, blocks).execute()


class WindowedLoop:
    """The sweeps of one learned run.

    Args:
        job: The run.
        config: What is learned.
        costs: Its clock.
        inputs: What is done to the inputs of linears.
        blocks: Where results go.
        folder: Of the workspace, in the output folder by default.
    """

    def __init__(
        self,
        job: Job,
        config: LearnedConfig,
        costs: Costs,
        inputs: QuantizedInputs,
        blocks: BlockWriter,
        folder: Path | None = None,
    ) -> None:
        self._job, self._config, self._costs, self._inputs, self._blocks = job, config, costs, inputs, blocks
        self._windows = config.windows(len(job.blocks))
        self._work = Workspace(folder or job.staging / WORK, writes=job.workers.is_main_process)
        self._states = WindowStates(self._work, self._windows, job.workers)
        self._initial = InitialWeights(job, config, costs, inputs, self._work)
        self._split = split_sequences(config, 0 if job.tokens is None else len(job.tokens), job.workers.size)
        self._scalings = WindowScalings(job, config)
        self._records: list[WindowRecord] = []
        if self._states:
            self._records = [WindowRecord.from_dict(row) for row in self._states.payload()["records"]]
        elif blocks.records:
            self._records = [WindowRecord.from_dict(row) for part in blocks.records.values() for row in part.windows]
        self._learners: dict[int, BlockLearner] = {}
        self._open_parts: dict[int, PartRecord] = {}  # of blocks that are being worked on
        self._done = self._total = 0
        self._fraction = 1.0  # of the input channels that the present sweep ends with

    def execute(self) -> None:
        """Learn, and write every block."""
        job, config = self._job, self._config
        visits = sum(len(window) for window in self._windows)
        self._total = visits * sum(len(fractions) for fractions in config.sweeps)
        job.emit(describe_windows(self._windows))
        job.emit(self._split.reason)
        job.listener(Event("blocks", "block visits", total=self._total, done=0))
        for sweep, fractions in enumerate(config.sweeps):
            self._sweep(sweep, fractions)
        self._work.close()

    def try_window(self, window: BlockWindow) -> None:
        """Learn in one window and drop the result, to see what it takes."""
        self._open(window, 0)
        learners = [self._learners[block.index] for block in window.blocks]
        steps = self._config.steps(len(window.runner.fitted_batches), [MAX_BITS])
        train_window(window, learners, self._config, sweep=0, shares=(1.0,), steps=steps, seed=0)
        for block in window.blocks:
            block.remove_input_transforms()

    # -- the sweeps --------------------------------------------------------------------------------------------------

    def _sweep(self, sweep: int, fractions: Sequence[float]) -> None:
        runner = self._job.make_runner(self._costs, batch=self._split.batch, held_out=self._split.held_out)
        runner.gathers_held_out = self._config.init_data == "all"
        self._fraction = fractions[-1]
        last = sweep == len(self._config.sweeps) - 1
        written = len(self._blocks.finished) >= len(self._job.blocks)
        if self._is_done(sweep, len(self._windows) - 1) and (not last or written):
            self._advance(sum(len(span) for span in self._windows) * len(fractions), "")
            return
        for window in runner.windows(self._windows):
            self._open(window, sweep)
            if not self._is_done(sweep, window.number):
                self._train(window, sweep, fractions)
            for block in window.blocks[: window.leaving]:
                self._finish_block(block, fractions[-1], last=last)
            self._states.delete_stale(range(window.span.start + window.leaving) if last else ())
            self._advance(len(window.span) * len(fractions), _label(window.span))

    def _is_done(self, sweep: int, window: int) -> bool:
        """Whether a window of a sweep was finished by the interrupted run."""
        blocks = self._job.blocks[self._windows[window].start : self._windows[window].stop]
        return self._states.reached(sweep, window) or all(name in self._blocks.finished for name in blocks)

    def _advance(self, visits: int, name: str) -> None:
        self._done += visits
        self._job.listener(Event("block_done", name=name, done=self._done, total=self._total))

    def _open(self, window: BlockWindow, sweep: int) -> None:
        """Make learners for the blocks that this window reaches for the first time."""
        for block in window.blocks:
            if block.name in self._blocks.finished:
                self._scalings.of(block)  # found where they were found the first time
            elif block.index not in self._learners:
                self._learners[block.index] = self._learner(window, block, sweep)

    def _learner(self, window: BlockWindow, context: BlockContext, sweep: int) -> BlockLearner:
        anchors, method = self._initial.of(window, context, self._settle)
        held = list[BlockLearner]()
        part = self._open_parts[context.index] = PartRecord()
        schemes = called_schemes(self._job, context, part)
        self._inputs.apply(context, lambda: held[0].share if held else 1.0)
        learner = BlockLearner(
            context,
            schemes,
            self._config,
            scalings=self._scalings.of(context),
            seed=self._job.recipe.calibration.seed,
            anchors=anchors,
            init=method,
        )
        held.append(learner)
        state = self._states.load(context.index, sweep)
        if state is not None:
            learner.load(state)
        return learner

    def _train(self, window: BlockWindow, sweep: int, fractions: Sequence[float]) -> None:
        job = self._job
        learners = [self._learners[block.index] for block in window.blocks]
        bits = [scheme.bits for scheme in job.assignment.schemes.values() if scheme is not None]
        steps = job.workers.broadcast_object(self._config.steps(len(window.runner.fitted_batches), bits))
        label = _label(window.span)
        records = train_window(
            window,
            learners,
            self._config,
            sweep=sweep,
            shares=fractions,
            steps=steps,
            seed=job.recipe.calibration.seed,
            on_progress=lambda done, of: job.listener(Event("layer", name=f"{label}, step {done} of {of}")),
        )
        self._records += records
        for record in records:
            for note in record.notes:
                job.emit(f"{label}: {note}")
        if window.leaving == len(window.blocks) == 1 and sweep == len(self._config.sweeps) - 1:
            return  # its one block is written next: nothing else would ask for the state
        states = {learner.context.index: learner.state() for learner in learners}
        self._states.save(sweep, window.number, states, {"records": [record.to_dict() for record in self._records]})

    def _settle(self, context: BlockContext) -> None:
        """Put what a block has learned into it; a finished one has its weights."""
        learner = self._learners.get(context.index)
        if learner is not None:
            learner.share = self._fraction  # that of the last stage, also in a run that was interrupted after it
            learner.settle()

    # -- one block ---------------------------------------------------------------------------------------------------

    def _finish_block(self, context: BlockContext, fraction: float, *, last: bool) -> None:
        """Settle a block's weights for the streams to pass through; in the last sweep, write the block."""
        if context.name in self._blocks.finished:
            self._blocks.replay(context, self._inputs)
            return
        learner = self._learners.pop(context.index)
        learner.share = fraction
        learner.settle()
        if last:
            self._write(context, learner)

    def _write(self, context: BlockContext, learner: BlockLearner) -> None:
        part = self._open_parts.pop(context.index)
        part.warnings += self._scalings.notes(context)
        part.windows = [record.to_dict() for record in self._records if record.start <= context.index < record.stop]
        weights = {
            name: dataclasses.replace(weight, scheme=stored_scheme(context, name, weight.scheme))
            for name, weight in learner.fold().items()
        }
        for name, weight in weights.items():
            part.layers.append(_record(f"{context.name}.{name}", self._job.method.name, weight))
        context.close()
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors |= self._blocks.pack(context, name, weight)
        self._blocks.write_block(context, tensors, part, learner.changed())


def _label(window: Window) -> str:
    return f"block {window.start}" if len(window) == 1 else f"blocks {window.start} to {window.stop - 1}"


def _record(name: str, method: str, weight: QuantizedWeight) -> LayerRecord:
    return LayerRecord(
        name=name,
        method=method,
        scheme=weight.scheme.record(),
        shape=weight.shape,
        bits_per_weight=weight.bits_per_weight,
        payload_bytes=weight.payload_bytes,
    )

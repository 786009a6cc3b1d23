"""A run whose method learns over windows of blocks: sweeps through the model, resumed window by window.

A sweep is one pass through the model. The first one, with ``init``, lets a layer-wise method make the starting point;
every other one learns. After a window what its blocks have learned is stored in the workspace; a block that leaves a
window for the last time in the last sweep is folded, packed and written. A resumed run skips what is stored: the
streams pass through the blocks again, with the same bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from calib.distributed import Workers
from calib.model.experts import expert_lists
from calib.runner.block import BlockContext
from calib.runner.runner import BlockWindow, CalibrationRunner
from calib.runner.window_schedule import Window, describe_windows
from ptq.checkpoint.journal import FinishedPart
from ptq.checkpoint.workspace import WORK, Workspace
from ptq.checkpoint.writer import STAGING, CheckpointWriter
from ptq.containers.native import NATIVE
from ptq.errors import ModelError, UsageError
from ptq.learning.block import BlockLearner
from ptq.learning.config import LearnedConfig
from ptq.learning.training import WindowRecord, train_window
from ptq.pipeline.events import Event, Listener
from ptq.pipeline.input_transforms import stored_scheme
from ptq.pipeline.preparation.scheme_assignment import Plan
from ptq.quantized import QuantizedWeight
from ptq.recipe import Recipe
from ptq.report import LayerRecord, PartRecord
from ptq.scheme import MAX_BITS, Scheme
from ptq.transforms.scaling.search import Scaling, find_scalings, in_float32, unsupported_reason

__all__ = ["Host", "WindowRun"]

_STATE = re.compile(r"state-(\d+)-(\d+)")


class Host(Protocol):
    """What a windowed run asks of `ptq.pipeline.run.Run`, where all of this is told."""

    plan: Plan
    recipe: Recipe
    method: Any
    out: Path
    device: torch.device
    dtype: torch.dtype
    workers: Workers
    emit: Listener

    def make_runner(
        self, *, tokens: Tensor | None = None, batch: int | None = None, folder: Path | None = None
    ) -> CalibrationRunner: ...

    def transform_inputs(self, context: BlockContext, share: Callable[[], float] = ...) -> None: ...

    def check_kernels(self, context: BlockContext) -> None: ...

    def reached(self, context: BlockContext, part: PartRecord) -> dict[str, Scheme]: ...

    def solve_block(
        self, context: BlockContext, part: PartRecord, take: Callable[[str, QuantizedWeight], object]
    ) -> None: ...

    def replay(self, context: BlockContext, part: FinishedPart) -> None: ...

    def warn(self, part: PartRecord, *texts: str) -> None: ...

    def write_block(
        self,
        context: BlockContext,
        weights: Mapping[str, QuantizedWeight],
        changed: Mapping[str, Tensor],
        part: PartRecord,
        writer: CheckpointWriter | None,
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A file of the workspace with the state of a window's blocks after it."""

    name: str
    sweep: int
    window: int


class WindowRun:
    """Everything that one learned quantization needs beside its `Run`.

    Args:
        run: the run; config: what is learned.
        finished: parts on the disk; parts: their records, to be added to; writer: on the process that writes.
        folder: of the workspace, in the output folder by default.
    """

    def __init__(
        self,
        run: Host,
        config: LearnedConfig,
        finished: dict[str, FinishedPart],
        parts: dict[str, PartRecord],
        writer: CheckpointWriter | None,
        folder: Path | None = None,
    ) -> None:
        self.run, self.config, self.finished, self.parts, self.writer = run, config, finished, parts, writer
        self.windows = config.windows(len(run.plan.blocks))
        self.work = Workspace(folder or run.out / STAGING / WORK, writes=run.workers.is_main_process)
        self.records: list[WindowRecord] = []
        self._learners: dict[int, BlockLearner] = {}
        self._open_parts: dict[int, PartRecord] = {}  # of blocks that are being worked on
        self._scalings: dict[object, tuple[Scaling, ...]] = {}
        self._notes: dict[int, list[str]] = {}  # on scalings, by block
        self._done = 0
        self._take_stock()

    def _take_stock(self) -> None:
        """What an interrupted run has left; all processes see the same."""
        names = self.run.workers.broadcast_object(self.work.names())
        states = [_Stored(name, *map(int, found.groups())) for name in names if (found := _STATE.fullmatch(name))]
        self._states = sorted(states, key=lambda one: (one.sweep, one.window))
        self._anchored = {name for name in names if name.startswith("init-")}
        if self._states:
            payload = self.work.payload(self._states[-1].name)
            self.records = [WindowRecord.from_dict(row) for row in payload["records"]]
        elif self.parts:
            self.records = [WindowRecord.from_dict(row) for part in self.parts.values() for row in part.windows]

    # -- the sweeps --------------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """Learn, and write every block."""
        run = self.run
        visits = sum(len(window) for window in self.windows)
        total = visits * sum(len(shares) for shares in self.config.sweeps)
        total += len(run.plan.blocks) if self.config.init != "none" else 0
        run.emit(Event("message", describe_windows(self.windows)))
        run.emit(Event("blocks", "block visits", total=total, done=0))
        self._total = total
        if self.config.init != "none" and len(self._anchored) < len(run.plan.blocks) and not self._states:
            self._make_anchors()
        elif self.config.init != "none":
            self._advance(len(run.plan.blocks), "starting point")
        for sweep, shares in enumerate(self.config.sweeps):
            self._sweep(sweep, shares)
        self.work.close()

    def _make_anchors(self) -> None:
        """The layer-wise method's result, block by block, into the workspace."""
        run, runner = self.run, self.run.make_runner()
        for context in runner:
            name = f"init-{context.index:05d}"
            if name in self._anchored:
                run.transform_inputs(context)
                for linear, weight in self._anchors(context).items():
                    context.replace(linear, weight.to(run.device).dequantize(run.dtype))
            else:
                weights: dict[str, QuantizedWeight] = {}
                run.solve_block(context, PartRecord(), weights.__setitem__)
                context.close()
                self._save_anchors(name, context, weights)
            self._advance(1, context.name)
        run.workers.broadcast_object(None)  # the files are there for all
        self._anchored = set(run.workers.broadcast_object(self.work.names()))

    def _save_anchors(self, name: str, context: BlockContext, weights: dict[str, QuantizedWeight]) -> None:
        tensors: dict[str, Tensor] = {}
        for linear, weight in weights.items():
            tensors.update(weight.tensors(linear))
        self.work.save(name, tensors, {"block": context.name, "linears": sorted(weights)})

    def _anchors(self, context: BlockContext) -> dict[str, QuantizedWeight]:
        """Starting points of a block's linears; none if no method makes them."""
        name = f"init-{context.index:05d}"
        if self.config.init == "none":
            return {}
        tensors, schemes = self.work.load(name), self.run.plan.in_block(context.name)
        shapes = {linear: (context.full(linear).shape[0], context.full(linear).shape[1]) for linear in context.linears}
        return {
            linear: NATIVE.read_layer(linear, tensors, schemes[linear], shapes[linear])
            for linear in self.work.payload(name)["linears"]
        }

    def _sweep(self, sweep: int, shares: Sequence[float]) -> None:
        run, runner = self.run, self.run.make_runner(batch=self.config.batch)
        last = sweep == len(self.config.sweeps) - 1
        if self._over(sweep, len(self.windows) - 1) and (not last or len(self.finished) >= len(run.plan.blocks)):
            self._advance(sum(len(window) for window in self.windows) * len(shares), "")
            return
        for window in runner.windows(self.windows):
            self._open(window, sweep)
            if not self._over(sweep, window.number):
                self._train(window, sweep, shares)
            for block in window.blocks[: window.leaving]:
                self._leave(block, shares[-1], last=last)
            self._tidy(sweep, window, last=last)
            self._advance(len(window.span) * len(shares), _label(window.span))

    def _over(self, sweep: int, window: int) -> bool:
        """Whether a window of a sweep was finished by the interrupted run."""
        reached = [(one.sweep, one.window) for one in self._states]
        blocks = self.run.plan.blocks[self.windows[window].start : self.windows[window].stop]
        return bool(reached and reached[-1] >= (sweep, window)) or all(name in self.finished for name in blocks)

    def _advance(self, visits: int, name: str) -> None:
        self._done += visits
        self.run.emit(Event("block_done", name=name, done=self._done, total=self._total))

    # -- one block ---------------------------------------------------------------------------------------------------

    def _open(self, window: BlockWindow, sweep: int) -> None:
        """Learners for the blocks that this window reaches for the first time."""
        for block in window.blocks:
            if block.name in self.finished:
                self._scalings_of(block)  # found where they were found the first time
                continue
            if block.index in self._learners:
                continue
            self._learners[block.index] = self._learner(block, sweep)

    def _learner(self, context: BlockContext, sweep: int) -> BlockLearner:
        run, held = self.run, list[BlockLearner]()
        part = self._open_parts[context.index] = PartRecord()
        run.check_kernels(context)
        schemes = run.reached(context, part)
        run.transform_inputs(context, lambda: held[0].share if held else 1.0)
        learner = BlockLearner(
            context,
            schemes,
            self.config,
            scalings=self._scalings_of(context),
            seed=run.recipe.calibration.seed,
            anchors=self._anchors(context),
        )
        held.append(learner)
        stored = self._latest(context.index, sweep)
        if stored is not None:
            prefix = f"{context.index}|"
            state = self.work.load(stored.name)
            learner.load({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        return learner

    def _latest(self, block: int, sweep: int) -> _Stored | None:
        """The newest state of a block, not of a later sweep."""
        found = [one for one in self._states if one.sweep <= sweep and self._holds(one, block)]
        return found[-1] if found else None

    def _holds(self, stored: _Stored, block: int) -> bool:
        window = self.windows[stored.window]
        return window.start <= block < window.stop

    def _scalings_of(self, context: BlockContext) -> tuple[Scaling, ...]:
        """Channel scalings of a block, found once for every kind of block."""
        schemes = self.run.plan.in_block(context.name)
        wanted = self.config.scaling == "on" or any(scheme.act_bits is not None for scheme in schemes.values())
        if self.config.scaling == "off" or not wanted:
            return ()
        kind = (type(context.block), tuple(context.linears))
        try:
            return self._tried_scalings(context, kind)
        except ModelError as error:
            if self.config.scaling == "on":
                raise
            self._note(context, f"{context.name}: channels are not scaled: {error}")
            return ()

    def _tried_scalings(self, context: BlockContext, kind: object) -> tuple[Scaling, ...]:
        context.use(full=True)
        hidden, call = context.runner.hidden(0, full=True), context.runner.call(0, context.index, full=True)
        inside = tuple(f"{name}." for name in expert_lists(context.block))  # tried on an expert by itself
        with context.plain_inputs(), in_float32(context.block, call, hidden) as run:
            if kind not in self._scalings:
                self._scalings[kind] = self._find_scalings(context, run)
                return self._scalings[kind]
            reasons = {
                scaling.name: None
                if inside and all(use.parameter.startswith(inside) for use in scaling.uses)
                else unsupported_reason(context.block, run, scaling)
                for scaling in self._scalings[kind]
            }
        for name, reason in reasons.items():
            if reason:
                self._note(context, f"{context.name}: channels of {name} are not scaled: {reason}")
        return tuple(scaling for scaling in self._scalings[kind] if not reasons[scaling.name])

    def _find_scalings(self, context: BlockContext, run: Callable[[], Tensor]) -> tuple[Scaling, ...]:
        found = find_scalings(context.block, run)
        schemes = self.run.plan.in_block(context.name)
        rotated = {f"{name}.weight" for name, scheme in schemes.items() if scheme.input_rotation is not None}
        kept = tuple(
            scaling
            for scaling in found.scalings
            if not any(use.axis == 1 and use.parameter in rotated for use in scaling.uses)
        )
        if found.missing and self.config.scaling == "on":
            raise UsageError(
                f"{context.name}: not all channels can be scaled: {'; '.join(found.missing)}. Say -O scaling=auto, "
                f"which goes on without these where activations are quantized."
            )
        for reason in found.missing:
            self._note(context, f"{context.name}: channels are not scaled, {reason}")
        return kept

    def _note(self, context: BlockContext, text: str) -> None:
        """A warning about a block's scalings, for its record: scalings are found in the first sweep, records are begun
        in every one. What a later sweep finds again (not all blocks are tried at once) is said once."""
        notes = self._notes.setdefault(context.index, [])
        if text not in notes:
            notes.append(text)
            self.run.emit(Event("message", text))

    def try_window(self, window: BlockWindow) -> None:
        """Learn in one window and drop the result, to see what it takes."""
        self._open(window, 0)
        learners = [self._learners[block.index] for block in window.blocks]
        steps = self.config.steps(len(window.runner.batches), [MAX_BITS])
        train_window(window, learners, self.config, sweep=0, shares=(1.0,), steps=steps, seed=0)
        for block in window.blocks:
            block.remove_input_transforms()

    # -- one window --------------------------------------------------------------------------------------------------

    def _train(self, window: BlockWindow, sweep: int, shares: Sequence[float]) -> None:
        run = self.run
        learners = [self._learners[block.index] for block in window.blocks]
        bits = [scheme.bits for scheme in run.plan.schemes.values() if scheme is not None]
        steps = run.workers.broadcast_object(self.config.steps(len(window.runner.batches), bits))
        label = _label(window.span)
        records = train_window(
            window,
            learners,
            self.config,
            sweep=sweep,
            shares=shares,
            steps=steps,
            seed=run.recipe.calibration.seed,
            on_progress=lambda done, of: run.emit(Event("layer", name=f"{label}, step {done} of {of}")),
        )
        self.records += records
        for record in records:
            for note in record.notes:
                run.emit(Event("message", f"{label}: {note}"))
        if window.leaving == len(window.blocks) == 1 and sweep == len(self.config.sweeps) - 1:
            return  # its one block is written next: nothing else would ask for the state
        name = f"state-{sweep:02d}-{window.number:05d}"
        tensors = {
            f"{learner.context.index}|{key}": value for learner in learners for key, value in learner.state().items()
        }
        self.work.save(name, tensors, {"records": [record.to_dict() for record in self.records]})
        run.workers.broadcast_object(None)
        self._states.append(_Stored(name, sweep, window.number))

    def _leave(self, context: BlockContext, share: float, *, last: bool) -> None:
        """A block's weights for the streams to pass through; in the last sweep the block is written."""
        run = self.run
        if context.name in self.finished:
            run.replay(context, self.finished[context.name])
            return
        learner = self._learners.pop(context.index)
        learner.share = share
        learner.settle()
        if last:
            self.parts[context.name] = self._write(context, learner)

    def _write(self, context: BlockContext, learner: BlockLearner) -> PartRecord:
        run, part = self.run, self._open_parts.pop(context.index)
        part.warnings += self._notes.get(context.index, [])
        part.windows = [record.to_dict() for record in self.records if record.start <= context.index < record.stop]
        weights = {
            name: dataclasses.replace(weight, scheme=stored_scheme(context, name, weight.scheme))
            for name, weight in learner.fold().items()
        }
        for name, weight in weights.items():
            part.layers.append(_record(f"{context.name}.{name}", run.method.name, weight))
        context.close()
        run.write_block(context, weights, learner.changed(), part, self.writer)
        return part

    def _tidy(self, sweep: int, window: BlockWindow, *, last: bool) -> None:
        """Remove states that nobody will ask for again: of blocks that are written, or stored anew."""
        written = set(range(window.span.start + window.leaving)) if last else set()
        kept = []
        for number, one in enumerate(self._states):
            span = self.windows[one.window]
            later = self._states[number + 1 :]
            needed = [
                block
                for block in range(span.start, span.stop)
                if block not in written and not any(self._holds(other, block) for other in later)
            ]
            if needed or number == len(self._states) - 1:
                kept.append(one)
            else:
                self.work.drop(one.name)
        self._states = kept


def _label(window: Window) -> str:
    return f"block {window.start}" if len(window) == 1 else f"blocks {window.start} to {window.stop - 1}"


def _record(name: str, method: str, weight: QuantizedWeight) -> LayerRecord:
    return LayerRecord(name, method, weight.scheme.record(), weight.shape, weight.bits_per_weight, weight.payload_bytes)

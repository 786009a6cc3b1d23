"""Channel scalings of the blocks of a learned run, found once for every kind of block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calib.model.experts import expert_lists
from calib.runner.block import BlockContext
from ptq.errors import ModelError, UsageError
from ptq.learning.config import LearnedConfig
from ptq.pipeline.job import Job
from ptq.pipeline.preparation.schemes.block_maps import BlockKind
from ptq.transforms.scaling.search import Scaling, find_scalings, in_float32, unsupported_reason

__all__ = ["WindowScalings"]


class WindowScalings:
    """Scalings by kind of block, and what a reader must know of them.

    Args:
        job: The run.
        config: What is learned.
    """

    def __init__(self, job: Job, config: LearnedConfig) -> None:
        self._job, self._config = job, config
        self._found: dict[BlockKind, tuple[Scaling, ...]] = {}
        self._notes: dict[int, list[str]] = {}

    def of(self, context: BlockContext) -> tuple[Scaling, ...]:
        """Channel scalings of a block; none where nothing asks for them."""
        schemes = self._job.assignment.in_block(context.name)
        wanted = self._config.scaling == "on" or any(scheme.act_bits is not None for scheme in schemes.values())
        if self._config.scaling == "off" or not wanted:
            return ()
        try:
            return self._tried(context, (type(context.block), tuple(context.linears)))
        except ModelError as error:
            if self._config.scaling == "on":
                raise
            self._note(context, f"{context.name}: channels are not scaled: {error}")
            return ()

    def notes(self, context: BlockContext) -> list[str]:
        """Warnings for the record of a block."""
        return self._notes.get(context.index, [])

    def _tried(self, context: BlockContext, kind: BlockKind) -> tuple[Scaling, ...]:
        context.use(full=True)
        hidden, call = context.runner.hidden(0, full=True), context.runner.call(0, context.index, full=True)
        inside = tuple(f"{name}." for name in expert_lists(context.block))  # tried on an expert by itself
        with context.plain_inputs(), in_float32(context.block, call, hidden) as run:
            if kind not in self._found:
                self._found[kind] = self._find(context, run)
                return self._found[kind]
            reasons = {
                scaling.name: None
                if inside and all(use.parameter.startswith(inside) for use in scaling.uses)
                else unsupported_reason(context.block, run, scaling)
                for scaling in self._found[kind]
            }
        for name, reason in reasons.items():
            if reason:
                self._note(context, f"{context.name}: channels of {name} are not scaled: {reason}")
        return tuple(scaling for scaling in self._found[kind] if not reasons[scaling.name])

    def _find(self, context: BlockContext, run: Callable[[], Tensor]) -> tuple[Scaling, ...]:
        found = find_scalings(context.block, run)
        schemes = self._job.assignment.in_block(context.name)
        rotated = {f"{name}.weight" for name, scheme in schemes.items() if scheme.input_rotation is not None}
        kept = tuple(
            scaling
            for scaling in found.scalings
            if not any(use.axis == 1 and use.parameter in rotated for use in scaling.uses)
        )
        if found.missing and self._config.scaling == "on":
            raise UsageError(
                f"{context.name}: not all channels can be scaled: {'; '.join(found.missing)}. Say -O scaling=auto, "
                f"which goes on without these where activations are quantized."
            )
        for reason in found.missing:
            self._note(context, f"{context.name}: channels are not scaled, {reason}")
        return kept

    def _note(self, context: BlockContext, text: str) -> None:
        """Note a warning. Scalings are found in the first sweep, records are begun in every one; what a later sweep
        finds again (not all blocks are tried at once) is emitted once."""
        notes = self._notes.setdefault(context.index, [])
        if text not in notes:
            notes.append(text)
            self._job.emit(text)

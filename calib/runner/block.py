"""What a runner hands out: a block with its weights, and its input groups one after another; see `calib.runner.runner`.

A `BlockContext` runs its block for either stream: with the checkpoint's own tensors for the full-precision one, with
what was put in their place for the quantized one, which may also quantize what its linears are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calib.distributed import Workers
from calib.model.block_inputs import BlockCall
from calib.model.input_groups import BlockMap, InputGroup
from calib.runner.activation_store import ActivationStore
from calib.runner.block_weights import BlockWeights, InputTransform
from calib.runner.expert_routing import RoutedRows
from calib.runner.forward import check_finite, check_range, three_dims
from calib.runner.suspended_forward import BlockPasses
from calib.stats import TWO_STREAMS, GroupStatistics, Stat, StatisticsAccumulator
from calib.timing import Timing

__all__ = ["BlockContext", "ExecutionContext", "InputTransform", "LinearGroup"]


class ExecutionContext(Protocol):
    """What a `BlockContext` needs from its runner."""

    device: torch.device
    dtype: torch.dtype
    timing: Timing
    flops: Timing
    workers: Workers

    @property
    def has_tokens(self) -> bool: ...

    @property
    def two_streams(self) -> bool: ...

    @property
    def batches(self) -> range: ...

    @property
    def gathered_batches(self) -> range: ...

    @property
    def held_out_batches(self) -> range: ...

    def first_sequence(self, batch: int) -> int: ...

    def activations(self, *, full: bool) -> ActivationStore: ...

    def hidden(self, batch: int, *, full: bool) -> Tensor: ...

    def call(self, batch: int, block: int, *, full: bool) -> BlockCall: ...

    def map_of(self, context: BlockContext) -> BlockMap: ...

    def fits_lockstep(self, groups: Sequence[InputGroup], tokens: int) -> bool: ...

    def count_pass(self, flops: float, batch: int) -> None: ...


class BlockContext(BlockWeights):
    """One block, loaded; see the head of this file.

    Args:
        runner: passes, streams and processes.
        index: number of the block.
        name: name of the block in the model.
        block: the module with its checkpoint weights.
    """

    def __init__(self, runner: ExecutionContext, index: int, name: str, block: nn.Module) -> None:
        super().__init__(
            block,
            device=runner.device,
            dtype=runner.dtype,
            two_streams=runner.two_streams,
            runs=runner.has_tokens,
        )
        self.runner, self.index, self.name = runner, index, name
        self._passes: dict[bool, BlockPasses] = {}  # by whether they are the full-precision stream's
        self._rows: RoutedRows | None = None
        self._closed = False

    def groups(self, needs: frozenset[Stat], only: frozenset[str]) -> Iterator[LinearGroup]:
        """Input groups in the order of execution.

        Args:
            needs: the statistics that will be asked for.
            only: linears that will be quantized; groups without any are skipped.
        """
        with self.runner.timing.part("passes", self.runner.device):
            wanted = [group for group in self.runner.map_of(self).groups if only.intersection(group.linears)]
            self._start(wanted)
        for group in wanted:
            if self._rows is not None and self._rows.name != group.experts:
                self._rows = None
            yield LinearGroup(self, group, tuple(name for name in group.linears if name in only), needs)
        self._rows = None

    def _start(self, groups: list[InputGroup]) -> None:
        """Get the passes of both streams ready."""
        if not self.runner.has_tokens:
            return
        points = list(dict.fromkeys(group.point for group in groups))
        before = frozenset(name for name, one in self._input_transforms.items() if one.follows_statistics)
        lockstep = self.runner.fits_lockstep(groups, self.runner.activations(full=False).tokens)
        kinds = (False, True) if self.runner.two_streams else (False,)
        for full in kinds:
            self._passes[full] = BlockPasses(
                self.block,
                lambda batch, full=full: self.runner.call(batch, self.index, full=full),  # type: ignore[misc]
                lambda batch, full=full: self.runner.hidden(batch, full=full),  # type: ignore[misc]
                len(self.runner.batches),
                points,
                lockstep=lockstep,
                before_hooks=before,
                use_weights=lambda full=full: self.use(full=full),  # type: ignore[misc]
            )

    def run(self, batch: int, hidden: Tensor, *, full: bool) -> Tensor:
        """The block's output for ``hidden`` with the weights of one stream; where the streams stand does not matter."""
        self.use(full=full)
        output = self.runner.call(batch, self.index, full=full)(self.block, hidden)
        self.runner.count_pass(self.runner.map_of(self).flops, batch)
        return output

    def arguments(self, group: InputGroup, batch: int, *, full: bool) -> list[tuple[Any, ...]]:
        """What the module at the group's point is called with in one batch of a stream, a call an entry."""
        passes = self._passes[full and self.runner.two_streams]
        found = passes.at(group.point, batch, group.calls)
        if not passes.lockstep:
            self.runner.count_pass(group.flops, batch)
        return found

    def inputs(self, group: InputGroup, batch: int, *, full: bool) -> Tensor | None:
        """The group's input in a stream for one batch, ``[sequences, tokens, n]``; ``None`` if no token comes here."""
        found = [arguments[0] for arguments in self.arguments(group, batch, full=full)]
        if not found:
            return None
        if len(found) == 1:
            return three_dims(found[0], self.runner.activations(full=full).shapes[batch])
        return torch.cat([part.reshape(1, -1, part.shape[-1]) for part in found], dim=1)

    @property
    def in_lockstep(self) -> bool:
        """Whether passes are suspended at groups, and not repeated."""
        return all(passes.lockstep for passes in self._passes.values())

    def rows(self, group: InputGroup) -> RoutedRows:
        """The rows that reach the experts of a mixture, gathered once for all of them."""
        if self._rows is None:
            full, own = (
                [self.arguments(group, batch, full=kind)[0] for batch in self.runner.batches] for kind in (True, False)
            )
            count = sum(1 for _ in self.block.get_submodule(group.experts).children())
            self._rows = RoutedRows(group.experts, count, own, full, self.runner.workers)
        return self._rows

    def run_expert(self, group: InputGroup, rows: Tensor, *, full: bool) -> Tensor:
        """The input ``[rows, 1, n]`` that an expert's linears get for ``rows`` ``[rows, width]`` of a stream."""
        expert, prefix = self.block.get_submodule(group.expert), f"{group.expert}."
        with self.weights_under(prefix, full=full):
            return RoutedRows.through(expert, group.linears[0].removeprefix(prefix), rows)

    def close(self) -> None:
        """Move the streams through the block; again, nothing."""
        if not self.runner.has_tokens or self._closed:
            return
        self._closed = True
        if not self._passes:
            self._start([])
        with self.runner.timing.part("passes", self.runner.device):
            flops = self.runner.map_of(self).flops
            for full, passes in self._passes.items():
                stream = self.runner.activations(full=full)
                for batch in self.runner.batches:
                    output = passes.finish(batch)
                    self.runner.count_pass(flops, batch)
                    if not full:
                        check_finite(output, self.name)
                    stream[batch] = output

    def drop_passes(self) -> None:
        """Drop what is suspended: the next passes begin at the block's start."""
        for passes in self._passes.values():
            passes.close()
        self._passes, self._rows = {}, None

    def abandon(self) -> None:
        """Drop what is suspended, and every reference to weights."""
        self.drop_passes()
        self.drop_weights()


class LinearGroup:
    """One input group of a block.

    Args:
        names: the group's linears that will be quantized, by name in the block.
    """

    def __init__(self, block: BlockContext, group: InputGroup, names: tuple[str, ...], needs: frozenset[Stat]) -> None:
        self.block, self.group, self.names = block, group, names
        self._needs = needs
        self.notes: tuple[str, ...] = ()

    def full_name(self, name: str) -> str:
        """A linear's name in the model."""
        return f"{self.block.name}.{name}"

    def weight(self, name: str) -> Tensor:
        """A linear's original weight, float32 ``[out, in]`` on the runner's device, for what it gets
        (`transform_inputs`).

        Raises:
            NumericalError: it holds NaN or Inf, or numbers whose squared errors would overflow.
        """
        weight = self.block.original(name).to(self.block.runner.device, torch.float32)
        check_range(weight, self.full_name(name))
        return self.block.weight_for_transformed_input(name, weight)

    def statistics(self) -> GroupStatistics | None:
        """The statistics asked for, over all batches of all processes; ``None`` if none was asked for or there are no
        tokens. What a reader must know of them is in ``notes`` afterwards."""
        runner = self.block.runner
        if not self._needs or not runner.has_tokens:
            return None
        weights = {name: self.block.full(name) for name in self.names}
        for name, weight in weights.items():
            check_range(weight, self.full_name(name))
        accumulator = StatisticsAccumulator(self.full_name(self.names[0]), weights, self._needs)
        with runner.timing.part("passes", runner.device):
            self._prepare()
        for batch in runner.gathered_batches:
            with runner.timing.part("passes", runner.device):
                own, full = self._inputs(batch)
                full = None if full is None else self.block.transformed_full_input(self.names[0], full)
            with runner.timing.part("statistics", runner.device):
                if own is not None and own.numel():
                    accumulator.add(own, full, runner.first_sequence(batch))
        with runner.timing.part("statistics", runner.device):
            if runner.workers.size > 1:
                accumulator.reduce_(runner.workers.sum_, runner.workers.gather)
            runner.flops["statistics"] = runner.flops.get("statistics", 0.0) + accumulator.flops
            return accumulator.finish()

    def _prepare(self) -> None:
        """Bring all passes of one stream to this group before those of the other: weights change hands once."""
        runner, group = self.block.runner, self.group
        if group.experts:
            self.notes = self.block.rows(group).notes(group.expert)
            if self._needs & {Stat.FOLDS, Stat.EFFECTIVE_TOKENS}:
                self.notes += ("its tokens count as independent of each other, although they come in sequences",)
        elif group.routed:
            stream = "full-precision" if runner.two_streams else "quantized"
            self.notes = (f"calibrated on the {stream} model's inputs: the block routes tokens by itself",)
        elif self._needs & TWO_STREAMS and runner.two_streams and self.block.in_lockstep:
            for full in (True, False):
                for batch in runner.batches:
                    self.block.arguments(group, batch, full=full)

    def _inputs(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Inputs of both streams for one batch; of the full-precision one only if a statistic needs it."""
        group, two = self.group, bool(self._needs & TWO_STREAMS)
        if group.experts:
            own, full = self.block.rows(group).of(group.expert, batch)
            return self.block.run_expert(group, own, full=False), (
                self.block.run_expert(group, full, full=True) if two else None
            )
        if group.routed:  # which tokens come here is the stream's own affair: only one stream can be used
            inputs = self.block.inputs(group, batch, full=True)
            return inputs, inputs if two else None
        return self.block.inputs(group, batch, full=False), (
            self.block.inputs(group, batch, full=True) if two else None
        )

    def replace(self, name: str, weight: Tensor) -> None:
        """From here on the quantized model has ``weight`` ``[out, in]`` in this linear."""
        self.block.replace(name, weight)

"""The walk: block after block through a model, with two streams of activations.

For every calibration batch the walk keeps X, the hidden states of the full-precision model, and X~, those of the model
quantized so far. At a block it loads the weights, finds the input groups by running the block once, and hands out one
`GroupVisit` after another in the order of execution; between them the caller replaces weights, so that the X~
statistics of a later group see the quantized linears before it. Then both streams move on and the block's memory is
given back.

    for visit in walk:                       # BlockVisit
        for group in visit.groups(needs):    # GroupVisit: names, weights, statistics
            group.replace(name, weight)

How passes are made is told in `calib.lockstep`, where hidden states lie in `calib.streams`, what several processes do
in `calib.workers`. The experts of a mixture are visited one by one, on the rows that the full-precision model's router
sends to each (`calib.routed`). The walk knows no method and no format. Run it inside `calib.precision.strict_float32`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.block_calls import BlockCall, capture_calls, own_state
from calib.checkpoint_reader import ModelSource
from calib.errors import UsageError
from calib.experts import expert_lists
from calib.groups import BlockMap, InputGroup, merge_maps, trace_block
from calib.lockstep import BlockPasses
from calib.model_map import find_blocks, find_linears, linear_weight, set_linear_weight
from calib.passes import check_finite, check_weight, place, three_dims
from calib.routed import RoutedRows
from calib.stats import TWO_STREAMS, GroupStatistics, Stat, StatisticsAccumulator
from calib.streams import Place, Stream, free_memory, total_memory
from calib.workers import ALONE, Workers

__all__ = ["BlockVisit", "GroupVisit", "Timing", "Walk", "batch_size"]

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_MIN_BATCHES = 8  # of eight sequences or more, so that as many processes can share them
_LOCKSTEP_SHARE = 0.4  # of all memory, so that the choice does not change from block to block
_LOCKSTEP_FREE = 0.8  # of what is free at the moment, which may be less
_PROBE_TOKENS = 16


def batch_size(samples: int, seqlen: int, device: torch.device) -> int:
    """Sequences in a batch. It depends on nothing else, so that sums are over the same batches on every machine."""
    return max(1, min(_BATCH_TOKENS.get(device.type, 4096) // seqlen, samples // _MIN_BATCHES))


class Timing(dict[str, float]):
    """Seconds by part of the work."""

    @contextlib.contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


class Walk:
    """Iterating yields a `BlockVisit` a block.

    Args:
        source: the model.
        tokens: calibration tokens int64 ``[sequences, seqlen]``, all of them on every process; ``None`` for methods
            without data: a block is then run on a few made-up tokens only to see which of its linears are called.
        device: where blocks are run and statistics gathered.
        dtype: dtype of the passes.
        two_streams: keep the full-precision stream beside the quantized one. A model with experts always has both:
            its full-precision router says which tokens are whose.
        timing: seconds are added here; flops: floating-point operations, by the same parts.
        offload: where hidden states are kept; folder: for those on disk.
        workers: the processes of this run.
        batch: sequences in a batch, `batch_size` if not given.
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        two_streams: bool = True,
        timing: Timing | None = None,
        flops: Timing | None = None,
        offload: Place = "none",
        folder: Path | None = None,
        workers: Workers = ALONE,
        batch: int | None = None,
    ) -> None:
        self.source, self.device, self.dtype, self.workers = source, device, dtype, workers
        self.timing = Timing() if timing is None else timing
        self.flops = Timing() if flops is None else flops
        self.block_names = find_blocks(source.skeleton)
        self._tokens = tokens
        self._two_streams = tokens is not None and (two_streams or bool(expert_lists(source.skeleton)))
        self._offload, self._folder = offload, folder
        self._batch, self._batch_size = batch, 1
        self._calls_full: list[list[BlockCall]] = []
        self._calls_quantized: list[list[BlockCall]] = []
        self._full: Stream | None = None
        self._quantized = Stream(device)
        self._maps: dict[object, BlockMap] = {}

    def __iter__(self) -> Iterator[BlockVisit]:
        try:
            self._capture(self._made_up_tokens() if self._tokens is None else self._tokens)
            for index, name in enumerate(self.block_names):
                names = self.tensors_of_block(name)
                with self.timing.part("read", self.device):
                    self.source.load(names)
                visit = BlockVisit(self, index, name, self.source.skeleton.get_submodule(name))
                try:
                    yield visit
                    visit.close()
                finally:
                    visit.abandon()
                    self.source.release(names)
                del visit  # not two blocks at a time
        finally:
            for stream in (self._full, self._quantized):
                if stream is not None:
                    stream.close()

    @property
    def has_tokens(self) -> bool:
        return self._tokens is not None

    @property
    def two_streams(self) -> bool:
        return self._two_streams

    def tensors_of_block(self, name: str) -> frozenset[str]:
        """Full names of a block's tensors."""
        return frozenset(tensor for tensor in self.source.tensor_names() if tensor.startswith(f"{name}."))

    def tensors_outside_blocks(self) -> frozenset[str]:
        """Full names of all other tensors: embedding, final norm, head, ..."""
        blocks = tuple(f"{name}." for name in self.block_names)
        return frozenset(tensor for tensor in self.source.tensor_names() if not tensor.startswith(blocks))

    def _made_up_tokens(self) -> Tensor:
        embedding: Any = self.source.skeleton.get_input_embeddings()
        vocabulary = int(embedding.weight.shape[0])
        return (torch.arange(_PROBE_TOKENS) % vocabulary)[None]

    def _capture(self, tokens: Tensor) -> None:
        """Embed the tokens and capture how the model calls its blocks."""
        model = self.source.skeleton
        needed = self.tensors_outside_blocks() - self._head_tensors() | self.tensors_of_block(self.block_names[0])
        with self.timing.part("read", self.device):
            self.source.load(needed)
            place(model, self.device, self.dtype)
        self._quantized, self._full = self._stream("quantized"), self._stream("full") if self._two_streams else None
        with self.timing.part("passes", self.device):
            calls = capture_calls(model, self.block_names, self._my_batches(tokens), self._enter)
            self._calls_full = [own_state(c) for c in calls] if self._two_streams else []
            self._calls_quantized = [own_state(c) for c in calls]
        self.source.release(needed)

    def _stream(self, name: str) -> Stream:
        folder = None if self._folder is None else self._folder / f"{name}-{self.workers.rank}"
        return Stream(self.device, self._offload, folder)

    def _enter(self, hidden: Tensor, tokens: Tensor) -> None:
        shape = (tokens.shape[0], tokens.shape[1])
        self._quantized.append(hidden, shape)
        if self._full is not None:
            self._full.append(hidden, shape)

    def _my_batches(self, tokens: Tensor) -> Iterator[Tensor]:
        """The batches of this process. Without calibration data every process runs the same few tokens."""
        size = self._batch_size = self._batch or batch_size(len(tokens), tokens.shape[1], self.device)
        batches = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        if self.has_tokens:
            if len(batches) < self.workers.size:
                raise UsageError(
                    f"{len(batches)} batches of {size} calibration sequences cannot be shared by {self.workers.size} "
                    f"processes: start at most {len(batches)}, or give more sequences."
                )
            batches = list(self.workers.part(batches))
        return (batch.to(self.device) for batch in batches)

    def _head_tensors(self) -> frozenset[str]:
        """The head's tensors where they are not the embedding's: calibration does not need them."""
        model = self.source.skeleton
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None or head.weight is model.get_input_embeddings().weight:
            return frozenset()
        name = next(name for name, module in model.named_modules() if module is head)
        return frozenset(tensor for tensor in self.source.tensor_names() if tensor.startswith(f"{name}."))

    # -- streams -----------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> range:
        """Numbers of this process's batches."""
        return range(len(self._quantized))

    def first_sequence(self, batch: int) -> int:
        """Number of a batch's first sequence among those of all processes."""
        return (batch * self.workers.size + self.workers.rank) * self._batch_size

    def stream(self, *, full: bool) -> Stream:
        """Hidden states that enter the current block. Without a full-precision stream both are the quantized one."""
        return self._full if full and self._full is not None else self._quantized

    def hidden(self, batch: int, *, full: bool) -> Tensor:
        """What enters the current block, ``[sequences, tokens, width]``."""
        return self.stream(full=full)[batch]

    def call(self, batch: int, block: int, *, full: bool) -> BlockCall:
        """How the model calls a block, with the state of that stream."""
        calls = self._calls_full if full and self._two_streams else self._calls_quantized
        return calls[batch][block]

    def map_of(self, visit: BlockVisit) -> BlockMap:
        """The map of a block. Blocks of one class with the same linears are traced once, unless the first batch did not
        reach all linears: then every block of the class is traced on all batches of all processes."""
        kind = (type(visit.block), tuple(visit.linears))
        for key in (kind, visit.name):
            if key in self._maps:
                return self._maps[key]
        traced = self.workers.share(self._trace(visit, 0))
        if traced.reaches(visit.linears):
            self._maps[kind] = traced
        else:
            traced = self._maps[visit.name] = self._trace_all(visit)
        return traced

    def _trace(self, visit: BlockVisit, batch: int) -> BlockMap:
        call, hidden = self.call(batch, visit.index, full=True), self.hidden(batch, full=True)
        return trace_block(visit.block, lambda: call(visit.block, hidden), math.prod(self._quantized.shapes[batch]))

    def _trace_all(self, visit: BlockVisit) -> BlockMap:
        mine = merge_maps([self._trace(visit, batch) for batch in self.batches])
        return merge_maps([self.workers.share(mine, rank) for rank in range(self.workers.size)])

    def fits_lockstep(self, groups: Sequence[InputGroup], tokens: int) -> bool:
        """Whether passes of so many tokens can be suspended at these groups: what they would hold fits into a share of
        the memory, and no linear is called several times in one pass."""
        width = int(self.source.skeleton.config.get_text_config().hidden_size)
        points = {group.point: width if group.experts else group.width for group in groups}
        features = sum(points.values()) + 2 * width
        size = tokens * features * self.dtype.itemsize * (2 if self._two_streams else 1)
        room = min(_LOCKSTEP_SHARE * total_memory(self.device), _LOCKSTEP_FREE * free_memory(self.device))
        return all(group.calls == 1 for group in groups) and size <= room

    def count_pass(self, flops: float, batch: int) -> None:
        """Note the work of a pass through a block, in floating-point operations a token."""
        self.flops["passes"] = self.flops.get("passes", 0.0) + flops * math.prod(self._quantized.shapes[batch])


class BlockVisit:
    """One block, loaded; see the head of this file.

    Args:
        index: its number; name: its name in the model; block: the module with its checkpoint weights.
    """

    def __init__(self, walk: Walk, index: int, name: str, block: nn.Module) -> None:
        self.walk, self.index, self.name, self.block = walk, index, name, block
        self.linears: Mapping[str, nn.Module] = find_linears(block)
        self._originals = {name: linear_weight(module).detach() for name, module in self.linears.items()}
        place(block, walk.device, walk.dtype)
        self._full = {name: linear_weight(module).detach() for name, module in self.linears.items()}
        self._replaced: dict[str, Tensor] = {}
        self._full_in_use = False
        self._passes: dict[bool, BlockPasses] = {}  # by whether they are the full-precision stream's
        self._rows: RoutedRows | None = None
        self._closed = False

    def groups(self, needs: frozenset[Stat], only: frozenset[str]) -> Iterator[GroupVisit]:
        """Input groups in the order of execution.

        Args:
            needs: the statistics that will be asked for.
            only: linears that will be quantized; groups without any are skipped.
        """
        with self.walk.timing.part("passes", self.walk.device):
            wanted = [group for group in self.walk.map_of(self).groups if only.intersection(group.linears)]
            self._start(wanted)
        for group in wanted:
            if self._rows is not None and self._rows.name != group.experts:
                self._rows = None
            yield GroupVisit(self, group, tuple(name for name in group.linears if name in only), needs)
        self._rows = None

    def _start(self, groups: list[InputGroup]) -> None:
        """Get the passes of both streams ready."""
        if not self.walk.has_tokens:
            return
        points = list(dict.fromkeys(group.point for group in groups))
        lockstep = self.walk.fits_lockstep(groups, self.walk.stream(full=False).tokens)
        kinds = (False, True) if self.walk.two_streams else (False,)
        for full in kinds:
            self._passes[full] = BlockPasses(
                self.block,
                lambda batch, full=full: self.walk.call(batch, self.index, full=full),  # type: ignore[misc]
                lambda batch, full=full: self.walk.hidden(batch, full=full),  # type: ignore[misc]
                len(self.walk.batches),
                points,
                lockstep=lockstep,
                use_weights=lambda full=full: self._use_weights(full=full),  # type: ignore[misc]
            )

    def _use_weights(self, *, full: bool) -> None:
        """Put the weights of one stream into the block."""
        full = full and self.walk.two_streams  # one stream alone is the quantized one
        if full == self._full_in_use:
            return
        weights = self._full if full else self._replaced
        for name in self._replaced:
            set_linear_weight(self.linears[name], weights[name])
        self._full_in_use = full

    # -- used by GroupVisit ------------------------------------------------------------------------------------------

    def original(self, name: str) -> Tensor:
        """The checkpoint's weight of a linear ``[out, in]``, as stored."""
        return self._originals[name]

    def full(self, name: str) -> Tensor:
        """The full-precision weight ``[out, in]`` in the dtype and on the device of the passes."""
        return self._full[name]

    def replace(self, name: str, weight: Tensor) -> None:
        """From now on the quantized stream runs with ``weight`` ``[out, in]`` in this linear."""
        if not self.walk.has_tokens:
            return  # nothing will be run any more
        self._replaced[name] = weight.to(self._full[name])
        if not self._full_in_use:
            set_linear_weight(self.linears[name], self._replaced[name])

    def arguments(self, group: InputGroup, batch: int, *, full: bool) -> list[tuple[Any, ...]]:
        """What the module at the group's point is called with in one batch of a stream, a call an entry."""
        passes = self._passes[full and self.walk.two_streams]
        found = passes.at(group.point, batch, group.calls)
        if not passes.lockstep:
            self.walk.count_pass(group.flops, batch)
        return found

    def inputs(self, group: InputGroup, batch: int, *, full: bool) -> Tensor | None:
        """The group's input in a stream for one batch, ``[sequences, tokens, n]``; ``None`` if no token comes here."""
        found = [arguments[0] for arguments in self.arguments(group, batch, full=full)]
        if not found:
            return None
        if len(found) == 1:
            return three_dims(found[0], self.walk.stream(full=full).shapes[batch])
        return torch.cat([part.reshape(1, -1, part.shape[-1]) for part in found], dim=1)

    @property
    def in_lockstep(self) -> bool:
        """Whether passes are suspended at groups, and not repeated."""
        return all(passes.lockstep for passes in self._passes.values())

    def rows(self, group: InputGroup) -> RoutedRows:
        """The rows that reach the experts of a mixture, gathered once for all of them."""
        if self._rows is None:
            full, own = (
                [self.arguments(group, batch, full=kind)[0] for batch in self.walk.batches] for kind in (True, False)
            )
            count = sum(1 for _ in self.block.get_submodule(group.experts).children())
            self._rows = RoutedRows(group.experts, count, own, full, self.walk.workers)
        return self._rows

    def run_expert(self, group: InputGroup, rows: Tensor, *, full: bool) -> Tensor:
        """The input ``[rows, 1, n]`` that an expert's linears get for ``rows`` ``[rows, width]`` of a stream."""
        expert, prefix = self.block.get_submodule(group.expert), f"{group.expert}."
        with self._own_weights(prefix, full=full):
            return RoutedRows.through(expert, group.linears[0].removeprefix(prefix), rows)

    @contextlib.contextmanager
    def _own_weights(self, prefix: str, *, full: bool) -> Iterator[None]:
        """One stream's weights in the linears under ``prefix`` alone; those of the whole block stay as they are."""
        names = [name for name in self._replaced if name.startswith(prefix)] if full != self._full_in_use else []
        for name in names:
            set_linear_weight(self.linears[name], (self._full if full else self._replaced)[name])
        try:
            yield
        finally:
            for name in names:
                set_linear_weight(self.linears[name], (self._replaced if full else self._full)[name])

    def close(self) -> None:
        """Move the streams through the block; again, nothing."""
        if not self.walk.has_tokens or self._closed:
            return
        self._closed = True
        if not self._passes:
            self._start([])
        with self.walk.timing.part("passes", self.walk.device):
            flops = self.walk.map_of(self).flops
            for full, passes in self._passes.items():
                stream = self.walk.stream(full=full)
                for batch in self.walk.batches:
                    output = passes.finish(batch)
                    self.walk.count_pass(flops, batch)
                    if not full:
                        check_finite(output, self.name)
                    stream[batch] = output

    def abandon(self) -> None:
        """Drop what is suspended, and every reference to weights."""
        for passes in self._passes.values():
            passes.close()
        self._passes, self._rows = {}, None
        self._originals, self._full, self._replaced = {}, {}, {}


class GroupVisit:
    """One input group of a block.

    Args:
        names: the group's linears that will be quantized, by name in the block.
    """

    def __init__(self, block: BlockVisit, group: InputGroup, names: tuple[str, ...], needs: frozenset[Stat]) -> None:
        self.block, self.group, self.names = block, group, names
        self._needs = needs
        self.notes: tuple[str, ...] = ()

    def full_name(self, name: str) -> str:
        """A linear's name in the model."""
        return f"{self.block.name}.{name}"

    def weight(self, name: str) -> Tensor:
        """A linear's original weight, float32 ``[out, in]`` on the walk's device.

        Raises:
            NumericalError: it holds NaN or Inf.
        """
        weight = self.block.original(name).to(self.block.walk.device, torch.float32)
        check_weight(weight, self.full_name(name))
        return weight

    def statistics(self) -> GroupStatistics | None:
        """The statistics asked for, over all batches of all processes; ``None`` if none was asked for or there are no
        tokens. What a reader must know of them is in ``notes`` afterwards."""
        walk = self.block.walk
        if not self._needs or not walk.has_tokens:
            return None
        weights = {name: self.block.full(name) for name in self.names}
        accumulator = StatisticsAccumulator(self.full_name(self.names[0]), weights, self._needs)
        with walk.timing.part("passes", walk.device):
            self._prepare()
        for batch in walk.batches:
            with walk.timing.part("passes", walk.device):
                own, full = self._inputs(batch)
            with walk.timing.part("statistics", walk.device):
                if own is not None and own.numel():
                    accumulator.add(own, full, walk.first_sequence(batch))
        with walk.timing.part("statistics", walk.device):
            if walk.workers.size > 1:
                accumulator.reduce_(walk.workers.sum_)
            walk.flops["statistics"] = walk.flops.get("statistics", 0.0) + accumulator.flops
            return accumulator.finish()

    def _prepare(self) -> None:
        """Bring all passes of one stream to this group before those of the other: weights change hands once."""
        walk, group = self.block.walk, self.group
        if group.experts:
            self.notes = self.block.rows(group).notes(group.expert)
            if self._needs & {Stat.FOLDS, Stat.EFFECTIVE_TOKENS}:
                self.notes += ("its tokens count as independent of each other, although they come in sequences",)
        elif group.routed:
            stream = "full-precision" if walk.two_streams else "quantized"
            self.notes = (f"calibrated on the {stream} model's inputs: the block routes tokens by itself",)
        elif self._needs & TWO_STREAMS and walk.two_streams and self.block.in_lockstep:
            for full in (True, False):
                for batch in walk.batches:
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

"""The calibration runner: block after block through a model, with two streams of activations.

For every calibration batch the runner keeps X, the hidden states of the full-precision model, and X~, those of the
model quantized so far. At a block it loads the weights, finds the input groups by running the block once, and hands
out one `LinearGroup` after another in the order of execution; between them the caller replaces weights, so that the X~
statistics of a later group see the quantized linears before it. Then both streams move on and the block's memory is
given back.

    for context in runner:                     # BlockContext
        for group in context.groups(needs):    # LinearGroup: names, weights, statistics
            group.replace(name, weight)

`CalibrationRunner.windows` does the same for windows of several blocks (`calib.runner.window_schedule`): a block is
loaded when a window's right edge reaches it, and the streams move through it when the left edge leaves it. One block
after another is the schedule of windows of one block, and served by the same code.

How passes are made is told in `calib.runner.suspended_forward`, where hidden states lie in
`calib.runner.activation_store`, what several processes do in `calib.distributed`. The experts of a mixture are visited
one by one, on the rows that the full-precision model's router sends to each (`calib.runner.expert_routing`). The runner
knows no method and no format. Run it inside `calib.precision.strict_float32`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.checkpoint.reader import ModelSource
from calib.distributed import SINGLE_PROCESS, Workers
from calib.errors import UsageError
from calib.model.block_inputs import BlockCall, capture_calls, own_state
from calib.model.experts import expert_lists
from calib.model.input_groups import BlockMap, InputGroup, merge_maps, trace_block
from calib.model.model_class import other_modalities
from calib.model.structure import find_blocks
from calib.runner.activation_store import ActivationStore, OffloadTarget, free_memory, total_memory
from calib.runner.block import BlockContext, LinearGroup
from calib.runner.forward import move_to
from calib.runner.window_schedule import Window, single_blocks
from calib.timing import Timing

__all__ = ["BlockContext", "BlockWindow", "CalibrationRunner", "LinearGroup", "Timing", "batch_size"]

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_MIN_BATCHES = 8  # of eight sequences or more, so that as many processes can share them
_LOCKSTEP_SHARE = 0.4  # of all memory, so that the choice does not change from block to block
_LOCKSTEP_FREE = 0.8  # of what is free at the moment, which may be less
_PROBE_TOKENS = 16


def batch_size(samples: int, seqlen: int, device: torch.device) -> int:
    """Sequences in a batch. It depends on nothing else, so that sums are over the same batches on every machine."""
    return max(1, min(_BATCH_TOKENS.get(device.type, 4096) // seqlen, samples // _MIN_BATCHES))


class CalibrationRunner:
    """Iterating yields a `BlockContext` a block.

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
        held_out: the last sequences, which go along in batches of their own, to be measured on.
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
        offload: OffloadTarget = "none",
        folder: Path | None = None,
        workers: Workers = SINGLE_PROCESS,
        batch: int | None = None,
        held_out: int = 0,
    ) -> None:
        self.source, self.device, self.dtype, self.workers = source, device, dtype, workers
        self.timing = Timing() if timing is None else timing
        self.flops = Timing() if flops is None else flops
        self.block_names = find_blocks(source.skeleton)
        self._tokens = tokens
        self._two_streams = tokens is not None and (two_streams or bool(expert_lists(source.skeleton)))
        self._offload, self._folder = offload, folder
        self._batch, self._held_out = batch, held_out
        self._first: list[int] = []  # numbers of the first sequences of this process's batches
        self._fitted = 0  # of these batches, without those that are held out
        self.gathers_held_out = True  # whether statistics are of sequences that are held out, too
        self._calls_full: list[list[BlockCall]] = []
        self._calls_quantized: list[list[BlockCall]] = []
        self._full: ActivationStore | None = None
        self._quantized = ActivationStore(device)
        self._maps: dict[object, BlockMap] = {}

    def __iter__(self) -> Iterator[BlockContext]:
        for window in self.windows(single_blocks(len(self.block_names))):
            yield window.blocks[0]

    def windows(self, schedule: Sequence[Window]) -> Iterator[BlockWindow]:
        """One `BlockWindow` per window. After it the streams move through the blocks that are in no later window, with
        what was put in the place of their weights.

        Args:
            schedule: windows whose starts do not go back and that leave no block out
                (`calib.runner.window_schedule.make_windows`).
        """
        alive: dict[int, BlockContext] = {}
        try:
            self._capture(self._made_up_tokens() if self._tokens is None else self._tokens)
            for number, window in enumerate(schedule):
                for index in range(window.start, window.stop):
                    if index not in alive:
                        alive[index] = self._open(index)
                after = schedule[number + 1].start if number + 1 < len(schedule) else len(self.block_names)
                leaving = min(after, window.stop) - window.start
                blocks = [alive[index] for index in range(window.start, window.stop)]
                yield BlockWindow(self, number, window, blocks, leaving)
                del blocks
                for index in range(window.start, window.start + leaving):
                    alive[index].close()
                    self._leave(alive.pop(index))
        finally:
            for context in alive.values():
                self._leave(context)
            for stream in (self._full, self._quantized):
                if stream is not None:
                    stream.close()

    def _open(self, index: int) -> BlockContext:
        name = self.block_names[index]
        with self.timing.part("read", self.device):
            self.source.load(self.tensors_of_block(name))
        return BlockContext(self, index, name, self.source.skeleton.get_submodule(name))

    def _leave(self, context: BlockContext) -> None:
        context.abandon()
        self.source.release(self.tensors_of_block(context.name))

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
        needed = self._tensors_before_blocks() | self.tensors_of_block(self.block_names[0])
        with self.timing.part("read", self.device):
            self.source.load(needed)
            move_to(model, self.device, self.dtype)
        self._quantized, self._full = (
            self._new_store("quantized"),
            self._new_store("full") if self._two_streams else None,
        )
        with self.timing.part("passes", self.device):
            calls = capture_calls(model, self.block_names, self._my_batches(tokens), self._enter)
            self._calls_full = [own_state(c) for c in calls] if self._two_streams else []
            self._calls_quantized = [own_state(c) for c in calls]
        self.source.release(needed)

    def new_store(self, name: str) -> ActivationStore:
        """An empty store that is kept where this runner keeps its own; the caller closes it."""
        return self._new_store(name)

    def _new_store(self, name: str) -> ActivationStore:
        folder = None if self._folder is None else self._folder / f"{name}-{self.workers.rank}"
        return ActivationStore(self.device, self._offload, folder)

    def _enter(self, hidden: Tensor, tokens: Tensor) -> None:
        shape = (tokens.shape[0], tokens.shape[1])
        self._quantized.append(hidden, shape)
        if self._full is not None:
            self._full.append(hidden, shape)

    def _my_batches(self, tokens: Tensor) -> Iterator[Tensor]:
        """The batches of this process: first those to fit on, then those that are held out. Without calibration data
        every process runs the same few tokens."""
        fitted = len(tokens) - self._held_out
        size = self._batch or batch_size(fitted, tokens.shape[1], self.device)
        starts, stops = range(0, fitted, size), range(fitted, len(tokens), size)
        if self.has_tokens and len(starts) < self.workers.size:
            raise UsageError(
                f"{len(starts)} batches of {size} calibration sequences cannot be shared by {self.workers.size} "
                f"processes: start at most {len(starts)}, or give more sequences."
            )
        mine = self.workers.part(starts) if self.has_tokens else starts
        self._fitted, self._first = len(mine), [*mine, *self.workers.part(stops)]
        ends = [min(start + size, fitted if start < fitted else len(tokens)) for start in self._first]
        return (tokens[start:end].to(self.device) for start, end in zip(self._first, ends, strict=True))

    def _tensors_before_blocks(self) -> frozenset[str]:
        """What lies outside the blocks and is needed to call them with text: no head, no vision tower."""
        others = tuple(f"{name}." for name in other_modalities(self.source.skeleton))
        outside = self.tensors_outside_blocks() - self._head_tensors()
        return frozenset(name for name in outside if not name.startswith(others))

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

    @property
    def fitted_batches(self) -> range:
        """Those of `batches` that are not held out."""
        return range(self._fitted)

    @property
    def gathered_batches(self) -> range:
        """Those of `batches` that statistics are of."""
        return self.batches if self.gathers_held_out else self.fitted_batches

    @property
    def held_out_batches(self) -> range:
        """Those of `batches` that are held out; a process may have none where others have some."""
        return range(self._fitted, len(self._quantized))

    def first_sequence(self, batch: int) -> int:
        """Number of a batch's first sequence among those of all processes."""
        return self._first[batch]

    def activations(self, *, full: bool) -> ActivationStore:
        """Hidden states that enter the current block. Without a full-precision stream both are the quantized one."""
        return self._full if full and self._full is not None else self._quantized

    def hidden(self, batch: int, *, full: bool) -> Tensor:
        """What enters the current block, ``[sequences, tokens, width]``."""
        return self.activations(full=full)[batch]

    @contextlib.contextmanager
    def ahead(self, blocks: Sequence[BlockContext]) -> Iterator[None]:
        """Inside, the streams stand after these blocks, through which they pass with what is in the place of their
        weights; afterwards they stand where they stood."""
        before = self._quantized, self._full
        moved: list[ActivationStore] = []
        try:
            if blocks:
                for full in (False, True) if self._two_streams else (False,):
                    moved.append(self._passed(blocks, full=full))
                self._quantized, self._full = moved[0], moved[1] if self._two_streams else None
            yield
        finally:
            self._quantized, self._full = before
            for stream in moved:
                stream.close()

    def _passed(self, blocks: Sequence[BlockContext], *, full: bool) -> ActivationStore:
        """A stream behind blocks."""
        stream, passed = self.activations(full=full), self._new_store(f"ahead-{'full' if full else 'quantized'}")
        with self.timing.part("passes", self.device):
            for batch in self.batches:
                hidden = stream[batch]
                for context in blocks:
                    hidden = context.run(batch, hidden, full=full)
                passed.append(hidden, stream.shapes[batch])
        return passed

    def call(self, batch: int, block: int, *, full: bool) -> BlockCall:
        """How the model calls a block, with the state of that stream."""
        calls = self._calls_full if full and self._two_streams else self._calls_quantized
        return calls[batch][block]

    def map_of(self, context: BlockContext) -> BlockMap:
        """The map of a block. Blocks of one class with the same linears are traced once, unless the first batch did not
        reach all linears: then every block of the class is traced on all batches of all processes."""
        kind = (type(context.block), tuple(context.linears))
        for key in (kind, context.name):
            if key in self._maps:
                return self._maps[key]
        traced = self.workers.broadcast_object(self._trace(context, 0))
        if traced.reaches(context.linears):
            self._maps[kind] = traced
        else:
            traced = self._maps[context.name] = self._trace_all(context)
        return traced

    def _trace(self, context: BlockContext, batch: int) -> BlockMap:
        call, hidden = self.call(batch, context.index, full=True), self.hidden(batch, full=True)
        with context.plain_inputs():  # what is quantized for every linear by itself is no longer the same tensor
            return self._trace_plain(context, batch, call, hidden)

    def _trace_plain(self, context: BlockContext, batch: int, call: BlockCall, hidden: Tensor) -> BlockMap:
        return trace_block(context.block, lambda: call(context.block, hidden), math.prod(self._quantized.shapes[batch]))

    def _trace_all(self, context: BlockContext) -> BlockMap:
        mine = merge_maps([self._trace(context, batch) for batch in self.batches])
        return merge_maps([self.workers.broadcast_object(mine, rank) for rank in range(self.workers.size)])

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


class BlockWindow:
    """Consecutive blocks, loaded; the streams stand before the first of them.

    Args:
        number: of the window in its schedule; span: which blocks.
        blocks: their contexts; leaving: how many of them, from the first on, are in no later window.
    """

    def __init__(
        self, runner: CalibrationRunner, number: int, span: Window, blocks: list[BlockContext], leaving: int
    ) -> None:
        self.runner, self.number, self.span, self.blocks, self.leaving = runner, number, span, blocks, leaving

    def run(self, batch: int, *, full: bool) -> Tensor:
        """The window's output in one batch of a stream, from what enters it in that stream."""
        hidden = self.runner.hidden(batch, full=full)
        for context in self.blocks:
            hidden = context.run(batch, hidden, full=full)
        return hidden

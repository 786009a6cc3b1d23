"""The walk: block after block through a model, with two streams of activations.

For every calibration batch the walk keeps X, the hidden states of the full-precision model, and X~, those of the model
quantized so far. At a block it loads the weights, finds the input groups by running the block once, and hands out one
`GroupVisit` after another in the order of execution; between them the caller replaces weights, so that the X~
statistics of a later group see the quantized linears before it. Then both streams move on and the block's memory is
given back.

    for visit in walk:                       # BlockVisit
        for group in visit.groups(needs):    # GroupVisit: names, weights, statistics
            group.replace(name, weight)
        visit.raw_tensors(...)               # what passes through

A part of the block that is finished (attention, once q, k, v and o are replaced) is not computed again for later
groups.
The inputs of the full-precision stream are captured in its one pass when they fit into a quarter of the free memory and
are computed again group by group when they do not. The walk knows no method and no format. Run it inside
`calib.precision.strict_float32`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from calib.block_calls import BlockCall, capture_calls, own_state
from calib.checkpoint_reader import ModelSource
from calib.errors import NumericalError
from calib.model_map import InputGroup, find_blocks, find_linears, linear_weight, set_linear_weight, trace_groups
from calib.passes import check_finite, place, recording, run_to
from calib.stats import TWO_STREAMS, GroupStatistics, Stat, StatisticsAccumulator

__all__ = ["BlockVisit", "GroupVisit", "Timing", "Walk"]

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_CAPTURE_SHARE = 0.25
_PROBE_TOKENS = 16


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
        tokens: calibration tokens int64 ``[sequences, seqlen]``; ``None`` for methods without data: a block is
            then run on a few made-up tokens only to see which of its linears are called.
        device: where blocks are run and statistics gathered.
        dtype: dtype of the passes.
        two_streams: keep the full-precision stream beside the quantized one.
        timing: seconds are added here.
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
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.timing = Timing() if timing is None else timing
        self.block_names = find_blocks(source.skeleton)
        self._tokens, self._two_streams = tokens, two_streams
        self._calls_full: list[list[BlockCall]] = []
        self._calls_quantized: list[list[BlockCall]] = []
        self._full: list[Tensor] = []
        self._quantized: list[Tensor] = []
        self._groups: dict[object, list[InputGroup]] = {}

    def __iter__(self) -> Iterator[BlockVisit]:
        self._capture(self._made_up_tokens() if self._tokens is None else self._tokens)
        for index, name in enumerate(self.block_names):
            names = self.tensors_of_block(name)
            with self.timing.part("read", self.device):
                self.source.load(names)
            visit = BlockVisit(self, index, name, self.source.skeleton.get_submodule(name))
            yield visit
            visit.close()
            self.source.release(names)

    @property
    def has_tokens(self) -> bool:
        return self._tokens is not None

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
        batch = max(1, _BATCH_TOKENS.get(self.device.type, 4096) // tokens.shape[1])
        needed = self.tensors_outside_blocks() - self._head_tensors() | self.tensors_of_block(self.block_names[0])
        with self.timing.part("read", self.device):
            self.source.load(needed)
            place(model, self.device, self.dtype)
        with self.timing.part("passes", self.device):
            batches = (tokens[i : i + batch].to(self.device) for i in range(0, len(tokens), batch))
            calls, self._full = capture_calls(model, self.block_names, batches)
            self._calls_full = [own_state(c) for c in calls] if self._two_streams else []
            self._calls_quantized = [own_state(c) for c in calls]
        self._quantized = list(self._full)
        self.source.release(needed)

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
        """Numbers of the batches."""
        return range(len(self._full))

    def call(self, batch: int, block: int, *, full: bool) -> BlockCall:
        """How the model calls a block, with the state of that stream."""
        calls = self._calls_full if full and self._two_streams else self._calls_quantized
        return calls[batch][block]

    def hidden(self, batch: int, *, full: bool) -> Tensor:
        """What enters the current block, ``[sequences, tokens, width]``."""
        return (self._full if full else self._quantized)[batch]

    @property
    def two_streams(self) -> bool:
        return self._two_streams

    def move(self, full: list[Tensor] | None, quantized: list[Tensor]) -> None:
        """The streams enter the next block. Without a full-precision stream both names mean the quantized one."""
        self._full, self._quantized = quantized if full is None else full, quantized

    def groups_of(self, visit: BlockVisit) -> list[InputGroup]:
        """Input groups of a block; blocks of one class with the same linears are traced once."""
        key = (type(visit.block), tuple(visit.linears))
        if key not in self._groups:
            call, hidden = self.call(0, visit.index, full=True), self.hidden(0, full=True)
            self._groups[key] = trace_groups(visit.block, lambda: call(visit.block, hidden))
        return self._groups[key]

    def has_room(self, features: int) -> bool:
        """Whether ``features`` numbers a token of the full-precision stream fit into a share of the free memory."""
        tokens = sum(hidden[..., 0].numel() for hidden in self._full)
        free = (
            torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        )
        return tokens * features * self.dtype.itemsize <= _CAPTURE_SHARE * free


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
        self._captured: dict[InputGroup, list[Tensor]] = {}
        self._full_next: list[Tensor] | None = None
        self._waiting: dict[str, set[str]] = {}  # parts of the block, with their linears that are still to be replaced
        self._outputs: dict[str, dict[int, Any]] = {}  # of parts that are done, by batch

    def groups(self, needs: frozenset[Stat], only: frozenset[str]) -> Iterator[GroupVisit]:
        """Input groups in the order of execution.

        Args:
            needs: the statistics that will be asked for.
            only: linears that will be quantized; groups without any are skipped.
        """
        with self.walk.timing.part("passes", self.walk.device):
            groups = self.walk.groups_of(self)
            wanted = [group for group in groups if only.intersection(group.linears)]
            if self.walk.has_tokens and self.walk.two_streams:
                self._pass_full(wanted if needs & TWO_STREAMS else [])
        self._watch_parts(frozenset(name for group in wanted for name in group.linears if name in only))
        for group in wanted:
            yield GroupVisit(self, group, tuple(name for name in group.linears if name in only), needs)
            self._captured.pop(group, None)

    def _watch_parts(self, linears: frozenset[str]) -> None:
        """Note which children of the block wait for which linears, where there is room to keep their outputs."""
        if not self.walk.has_tokens or not self.walk.has_room(self.walk.hidden(0, full=False).shape[-1]):
            return
        for name in linears:
            self._waiting.setdefault(name.partition(".")[0], set()).add(name)

    def _pass_full(self, groups: list[InputGroup]) -> None:
        """The full-precision stream's one pass through the block; captures group inputs where there is room."""
        features = sum(self._full[group.linears[0]].shape[1] for group in groups)
        if self.walk.has_room(features):
            self._captured = {group: [] for group in groups if group.calls == 1}
        outputs = []
        for batch in self.walk.batches:
            call, hidden = self.walk.call(batch, self.index, full=True), self.walk.hidden(batch, full=True)
            with recording(self.block, self._captured, hidden):
                outputs.append(call(self.block, hidden))
        self._full_next = outputs

    # -- used by GroupVisit ------------------------------------------------------------------------------------------

    def original(self, name: str) -> Tensor:
        """The checkpoint's weight of a linear ``[out, in]``, as stored."""
        return self._originals[name]

    def full(self, name: str) -> Tensor:
        """The full-precision weight ``[out, in]`` in the dtype and on the device of the passes."""
        return self._full[name]

    def replace(self, name: str, weight: Tensor) -> None:
        """From now on the quantized stream runs with ``weight`` ``[out, in]`` in this linear."""
        self._replaced[name] = weight.to(self._full[name])
        set_linear_weight(self.linears[name], self._replaced[name])
        part = name.partition(".")[0]
        self._waiting.get(part, set()).discard(name)
        if part in self._waiting and not self._waiting[part]:
            del self._waiting[part]
            self._outputs[part] = {}

    def inputs(self, group: InputGroup, batch: int) -> Tensor:
        """The group's input in the quantized stream for one batch, ``[sequences, tokens, n]``."""
        call = self.walk.call(batch, self.index, full=False)
        with self._done_parts(batch):
            return run_to(self.block, group, call, self.walk.hidden(batch, full=False))

    @contextlib.contextmanager
    def _done_parts(self, batch: int, *, last: bool = False) -> Iterator[None]:
        """Parts of the block whose linears are all replaced (attention, once q, k, v and o are) run once more and
        then give the output they gave: nothing that they depend on will change."""
        parts = [(self.block.get_submodule(name), outputs) for name, outputs in self._outputs.items()]
        handles = []
        for part, outputs in parts:
            if batch in outputs:
                part.forward = lambda *_, done=outputs[batch], **__: done
            elif not last:

                def keep(_: nn.Module, __: Any, output: Any, outputs: dict[int, Any] = outputs) -> None:
                    outputs[batch] = output

                handles.append(part.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part, _ in parts:
                part.__dict__.pop("forward", None)

    def full_inputs(self, group: InputGroup, batch: int) -> Tensor:
        """The group's input in the full-precision stream for one batch, captured or computed again."""
        if group in self._captured:
            return self._captured[group][batch]
        call = self.walk.call(batch, self.index, full=True)
        self._set_weights(self._full)
        try:
            return run_to(self.block, group, call, self.walk.hidden(batch, full=True))
        finally:
            self._set_weights(self._replaced)

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name in self._replaced:
            set_linear_weight(self.linears[name], weights[name])

    def close(self) -> None:
        """Move the streams through the block."""
        if not self.walk.has_tokens:
            return
        outputs = []
        with self.walk.timing.part("passes", self.walk.device):
            for batch in self.walk.batches:
                call = self.walk.call(batch, self.index, full=False)
                with self._done_parts(batch, last=True):
                    output = call(self.block, self.walk.hidden(batch, full=False))
                check_finite(output, self.name)
                outputs.append(output)
        self.walk.move(self._full_next, outputs)


class GroupVisit:
    """One input group of a block.

    Args:
        names: the group's linears that will be quantized, by name in the block.
    """

    def __init__(self, block: BlockVisit, group: InputGroup, names: tuple[str, ...], needs: frozenset[Stat]) -> None:
        self.block, self.group, self.names = block, group, names
        self._needs = needs

    def full_name(self, name: str) -> str:
        """A linear's name in the model."""
        return f"{self.block.name}.{name}"

    def weight(self, name: str) -> Tensor:
        """A linear's original weight, float32 ``[out, in]`` on the walk's device.

        Raises:
            NumericalError: it holds NaN or Inf.
        """
        weight = self.block.original(name).to(self.block.walk.device, torch.float32)
        if not bool(torch.isfinite(weight).all()):
            bad = (~torch.isfinite(weight)).float().mean().item()
            raise NumericalError(
                f"{self.full_name(name)}: {bad:.2%} of the weights are NaN or Inf. The checkpoint is damaged, or was "
                f"saved in a dtype it overflows."
            )
        return weight

    def statistics(self) -> GroupStatistics | None:
        """The statistics asked for, over all batches; ``None`` if none was asked for or there are no tokens."""
        walk = self.block.walk
        if not self._needs or not walk.has_tokens:
            return None
        weights = {name: self.block.full(name) for name in self.names}
        accumulator = StatisticsAccumulator(self.full_name(self.names[0]), weights, self._needs)
        two = bool(self._needs & TWO_STREAMS)
        for batch in walk.batches:
            with walk.timing.part("passes", walk.device):
                own = self.block.inputs(self.group, batch)
                full = self.block.full_inputs(self.group, batch) if two else None
            with walk.timing.part("statistics", walk.device):
                accumulator.add(own, full)
        with walk.timing.part("statistics", walk.device):
            return accumulator.finish()

    def replace(self, name: str, weight: Tensor) -> None:
        """From here on the quantized model has ``weight`` ``[out, in]`` in this linear."""
        self.block.replace(name, weight)

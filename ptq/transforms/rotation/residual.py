"""The offline rotation of the residual stream: the same model, its hidden states without outliers.

With the gains of all norms moved into the linears that read them, a root-mean-square norm does not see a rotation: if
everything that writes to the stream is multiplied by an orthogonal Q and everything that reads it by Q^T, all outputs
stay. A norm that subtracts the mean does not see a rotation that keeps the all-ones vector; one of these is used where
it is needed.

    embedding E -> E Q^T      writer W, b -> Q W, Q b      norm gain g -> 1      reader W -> W diag(g) Q^T
    norm bias c -> 0, reader bias b -> b + W c if all readers have a bias; otherwise c -> Q (c / g)

Merged into the checkpoint like this, nothing is left to do at run time, and a head that was tied to the embedding needs
a tensor of its own. Where the tie is kept, embedding, last norm and head stay as they were, and the stream is rotated
and rotated back beside them at run time (`ptq.transforms.rotation.online`).

`rotate_residual` gives a source that behaves like one whose checkpoint was rotated beforehand; tensors are rotated when
they are read. Before it returns it has tried the rotation on one block of every kind and on the model without blocks.

Source: SliceGPT (arXiv 2401.15024), section 3; QuaRot (arXiv 2404.00456), section 4, stage 1a.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.checkpoint.reader import ModelSource
from calib.errors import ModelError
from calib.model.block_inputs import BlockCall, capture_calls, own_state
from calib.model.structure import find_blocks, foreign_code
from calib.precision import strict_float32
from calib.runner.forward import move_to
from ptq.transforms.hadamard import ResidualRotation
from ptq.transforms.rotation.online import StreamRotation
from ptq.transforms.rotation.rotated_source import RotatedSource, get_parameter, put_parameter
from ptq.transforms.rotation.stream_roles import Part, block_parts, cannot_rotate, outside_parts
from ptq.transforms.tracing import trace

__all__ = ["TOLERANCE", "RotatedSource", "rotate_residual"]

TOLERANCE = 1e-4
"""Largest relative change of outputs in float32 that passes for none."""
_PROBE_TOKENS = 16
_PROBE_ROWS = 64  # of the vocabulary that are tried


def rotate_residual(source: ModelSource, seed: int, *, keep_tie: bool = False) -> RotatedSource:
    """The same model with its residual stream rotated by a random Hadamard rotation (`ResidualRotation`).

    ``source`` must not be used any more: its skeleton now belongs to the result.

    Args:
        source: The model.
        seed: Of the rotation.
        keep_tie: Keep a head tied to its embedding by rotating the stream beside them at run time. Models without a
            tie are rotated by their weights alone in any case.

    Raises:
        ModelError: the model cannot be rotated, or outputs change by more than `TOLERANCE`; names the part.
    """
    with torch.no_grad(), strict_float32():
        return _Search(source, keep_tie=keep_tie).rotated(seed)


class _Search:
    """Finds the parts of a model and tries the rotation on them, block by block.

    Args:
        source: The model.
        keep_tie: See `rotate_residual`.
    """

    def __init__(self, source: ModelSource, *, keep_tie: bool) -> None:
        self.source, self.model = source, source.skeleton
        self.blocks = find_blocks(self.model)
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no head that ptq can find: it cannot be rotated.")
        self.model.tie_weights()
        names = {module: name for name, module in self.model.named_modules()}
        self.embedding, self.head = names[embedding], names[head]
        self.tied = f"{self.embedding}.weight" if head.weight is embedding.weight else ""
        self.keeps_tie = keep_tie and bool(self.tied)
        self.tokens = (torch.arange(_PROBE_TOKENS) % min(_PROBE_ROWS, int(embedding.weight.shape[0])))[None]
        self.calls: list[BlockCall] = []
        self.hidden = torch.empty(0)  # what enters the first block
        self.returned: Any = None  # by the first block

    def rotated(self, seed: int) -> RotatedSource:
        """The rotated source, tried."""
        if self.tied and not self.keeps_tie:
            self._untie()
        outside = frozenset(n for n in self.source.tensor_names() if not n.startswith(self._prefixes()))
        with self._small_vocabulary(outside):
            outer = self._outside_parts()
            parts = {} if self.keeps_tie else dict(outer)
            examples: dict[object, tuple[int, dict[str, Part]]] = {}
            for index, name in enumerate(self.blocks):
                kind = self._kind(name)
                if kind not in examples:
                    examples[kind] = index, self._parts_of_block(index)
                parts |= {f"{name}.{tensor}": part.inside(name) for tensor, part in examples[kind][1].items()}
            keep_ones = any(part.centers for part in parts.values())
            rotation = ResidualRotation(self.hidden.shape[-1], seed, keep_ones=keep_ones)
            online = self._online(outer, rotation) if self.keeps_tie else None
            source = RotatedSource(
                self.source, rotation, parts, f"{self.head}.weight", "" if self.keeps_tie else self.tied, online
            )
            source.check_carried()
            for index, own in examples.values():
                self._try_block(source, index, own)
            self._try_outside(source, {} if self.keeps_tie else outer)
        if self.keeps_tie:
            self.model.tie_weights()
        return source

    def _online(self, outer: Mapping[str, Part], rotation: ResidualRotation) -> StreamRotation:
        """The rotation beside embeddings and last norm, which are what ``outer`` says of them."""
        embeddings = tuple(name.removesuffix(".weight") for name, part in outer.items() if part.kind == "write")
        ((norm, offset),) = {(part.norm, part.offset) for part in outer.values() if part.norm}
        return StreamRotation(rotation.seed, rotation.keep_ones, embeddings, norm, offset)

    # -- the model without its blocks --------------------------------------------------------------------------------

    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.blocks)

    def _untie(self) -> None:
        """Give the skeleton's head a weight of its own, so that tying does not put the embedding's there."""
        for config in (self.model.config, self.model.config.get_text_config()):
            config.tie_word_embeddings = False
        name = f"{self.head}.weight"
        put_parameter(self.model, name, torch.empty_like(get_parameter(self.model, name), device="meta"))
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        self.model.all_tied_weights_keys = {target: kept for target, kept in tied.items() if target != name}

    @contextlib.contextmanager
    def _small_vocabulary(self, outside: frozenset[str]) -> Iterator[None]:
        """Inside, all but the blocks is loaded in float32, with a few rows of the vocabulary."""
        embedding: Any = self.model.get_submodule(self.embedding)
        padding = getattr(embedding, "padding_idx", None)
        cut = [f"{name}.{leaf}" for name in (self.embedding, self.head) for leaf in self._leaves(name)]
        whole = {name: torch.empty_like(get_parameter(self.model, name), device="meta") for name in cut}
        try:
            self.source.load(outside - frozenset({f"{self.head}.weight"} if self.tied else ()))
            if self.tied:
                put_parameter(self.model, f"{self.head}.weight", get_parameter(self.model, self.tied))
            for name in cut:
                put_parameter(self.model, name, get_parameter(self.model, name)[:_PROBE_ROWS].clone())
            if padding is not None:
                embedding.padding_idx = None  # it may lie beyond these rows
            move_to(self.model, torch.device("cpu"), torch.float32)
            yield
        finally:
            if padding is not None:
                embedding.padding_idx = padding
            self.source.release(outside)
            for name, value in whole.items():
                put_parameter(self.model, name, value)

    def _leaves(self, name: str) -> list[str]:
        return [leaf for leaf, value in self.model.get_submodule(name)._parameters.items() if value is not None]

    def _outside_parts(self) -> dict[str, Part]:
        """Parts outside the blocks; notes how the model calls its blocks."""
        first = self.model.get_submodule(self.blocks[0])
        handle = first.register_forward_hook(lambda _, __, output: self._note_returned(output))
        try:
            with self._loaded(self.blocks[0]):
                calls = capture_calls(self.model, self.blocks, iter([self.tokens]), self._enter)
        finally:
            handle.remove()
        self.calls = calls[0]
        found = trace(self.model, lambda: self._hollow(), self.blocks)
        embeddings = [
            name
            for name, call in found.calls.items()
            if isinstance(self.model.get_submodule(name), nn.Embedding)
            and call.output.shape[-1] == self.hidden.shape[-1]
        ]
        return outside_parts(self.model, found, self.head, embeddings)

    def _note_returned(self, output: Any) -> None:
        self.returned = output if self.returned is None else self.returned

    def _enter(self, hidden: Tensor, _: Tensor) -> None:
        self.hidden = hidden

    def _hollow(self) -> tuple[Tensor, Tensor]:
        """What enters the first block and the logits, with blocks that return what they are called with."""
        entered: list[Tensor] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3)
            entered.append(hidden)
            if isinstance(self.returned, tuple | list):
                return type(self.returned)([hidden, *self.returned[1:]])
            return hidden

        blocks = [self.model.get_submodule(name) for name in self.blocks]
        for block in blocks:
            block.forward = stand_in
        try:
            with foreign_code(f"{type(self.model).__name__} cannot be run without its blocks"):
                logits: Tensor = self.model(input_ids=self.tokens, use_cache=False).logits
        finally:
            for block in blocks:
                del block.forward
        return entered[0], logits

    def _try_outside(self, source: RotatedSource, parts: Mapping[str, Part]) -> None:
        """The rotation of all but the blocks, on the small vocabulary.

        Raises:
            ModelError: hidden states or logits are not those of the model.
        """
        hidden, logits = self._hollow()
        if source.online is not None:
            source.online.install(self.model)  # for good: passes over the model rotate, too
        originals = {name: get_parameter(self.model, name) for name in parts}
        for name, value in originals.items():
            put_parameter(self.model, name, source.changed(name, value, originals.get(parts[name].weight)))
        rotated, again = self._hollow()
        _compare(rotated, source.rotation(hidden), "between the embedding and the first block", self.model)
        _compare(again, logits, "between the last block and the logits", self.model)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _kind(self, name: str) -> object:
        block = self.model.get_submodule(name)
        return type(block), tuple((leaf, tuple(p.shape)) for leaf, p in block.named_parameters())

    @contextlib.contextmanager
    def _loaded(self, name: str) -> Iterator[nn.Module]:
        """Inside, a block is in memory in float32."""
        names = frozenset(n for n in self.source.tensor_names() if n.startswith(f"{name}."))
        block = self.model.get_submodule(name)
        self.source.load(names)
        try:
            move_to(block, torch.device("cpu"), torch.float32)
            yield block
        finally:
            self.source.release(names)

    def _run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        with foreign_code(f"{self.blocks[index]} cannot be run by itself"):
            return own_state([self.calls[index]])[0](block, hidden)

    def _parts_of_block(self, index: int) -> dict[str, Part]:
        with self._loaded(self.blocks[index]) as block:
            return block_parts(block, lambda x: self._run(index, block, x), self.hidden, self.blocks[index])

    def _try_block(self, source: RotatedSource, index: int, parts: Mapping[str, Part]) -> None:
        """The rotation of one block.

        Raises:
            ModelError: its output is not the rotated one.
        """
        name = self.blocks[index]
        with self._loaded(name) as block:
            output = self._run(index, block, self.hidden)
            originals = {part: get_parameter(block, part) for part in parts}
            for part, value in originals.items():
                changed = source.changed(f"{name}.{part}", value, originals.get(parts[part].weight))
                put_parameter(block, part, changed)
            rotated = self._run(index, block, source.rotation(self.hidden).float())
        _compare(rotated, source.rotation(output), f"in {name}", self.model)


def _compare(found: Tensor, wanted: Tensor, where: str, model: nn.Module) -> None:
    change = float((found.double() - wanted).norm() / wanted.double().norm().clamp(min=1e-30))
    if not change <= TOLERANCE:
        raise cannot_rotate(
            f"{where} something else than norms and linears works on the hidden state of {type(model).__name__} "
            f"(rotated outputs differ by {change:.2g} of their size, limit {TOLERANCE:g})"
        )

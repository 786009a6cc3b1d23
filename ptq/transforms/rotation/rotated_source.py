"""A model source whose tensors are rotated on their way out; the transform itself is told in `residual`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.checkpoint.files import CompanionRule
from calib.checkpoint.reader import ModelSource
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError
from calib.model.experts import expert_lists
from ptq.transforms.hadamard import ResidualRotation
from ptq.transforms.rotation.online import StreamRotation
from ptq.transforms.rotation.stream_roles import Part, cannot_rotate

__all__ = ["RotatedSource", "get_parameter", "put_parameter"]

_CHUNK = 1 << 18  # numbers in float64 at a time: two megabytes stay in a cache
_STEEP = 1e3  # largest bias by gain of a norm whose bias has to stay in it


class RotatedSource:
    """A `ModelSource` whose tensors are rotated when they are read; made by
    `ptq.transforms.rotation.residual.rotate_residual`.

    Rotated tensors are computed in float64 and stored in the checkpoint's dtype: in half precision every rotated weight
    is rounded once, as it would be in a checkpoint that was rotated and saved.

    Args:
        source: The model as it is stored.
        rotation: Of the stream.
        parts: Of all tensors that are rotated, by full name.
        head: Name of the head's weight.
        tied: Name of the embedding's weight, if the head gets a tensor of its own that was the embedding's; else empty.
        online: What is left to rotate at run time; its hooks are on the skeleton already. ``None`` where nothing is.

    Attributes:
        rotation: of the stream.
        config_changes: what the config must say of the rotated model.
        notes: sentences for the user.
    """

    def __init__(
        self,
        source: ModelSource,
        rotation: ResidualRotation,
        parts: Mapping[str, Part],
        head: str,
        tied: str,
        online: StreamRotation | None = None,
    ) -> None:
        self._source, self.rotation, self._parts = source, rotation, parts
        self._head, self._tied, self.online = head, tied, online
        self.skeleton, self.name, self.dtype = source.skeleton, source.name, source.dtype
        self.quantization = source.quantization
        self.config_changes: Mapping[str, Any] = {"tie_word_embeddings": False} if tied else {}
        self.notes: tuple[str, ...] = ()
        if tied:
            size = sum(size for _, _, size in source.stored_sizes(frozenset({tied})))
            self.notes = (
                f"the rotation gives the head a tensor of its own, {head}: {size:,} bytes more "
                f"(--rotate-head online keeps it tied)",
            )
        elif online is not None:
            self.notes = (
                "the head stays tied to the embedding: the residual stream is rotated beside them at run time",
            )

    @property
    def folder(self) -> Path | None:
        return self._source.folder

    def tensor_names(self) -> frozenset[str]:
        return self._source.tensor_names() | (frozenset({self._head}) if self._tied else frozenset())

    def load(self, names: frozenset[str]) -> None:
        own = self._own_head(names)
        self._source.load(names - own)
        for name in own:
            put_parameter(self.skeleton, name, self._raw(self._tied).to(self.dtype))
        originals = {name: get_parameter(self.skeleton, name) for name in names if name in self._parts}
        for name, value in originals.items():
            weight = self._parts[name].weight
            put_parameter(self.skeleton, name, self.changed(name, value, originals.get(weight)))

    def release(self, names: frozenset[str]) -> None:
        self._source.release(names)

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        own = self._own_head(names)
        for part in self._portions(names - own):
            for key, parameter, tensor in self._source.raw_tensors(part):
                yield key, parameter, self._changed_raw(key, parameter, tensor)
        for name in own:
            yield name, name, self.changed(name, self._raw(self._tied))

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        own = self._own_head(names)
        for part in self._portions(names - own):
            yield from self._source.stored_sizes(part)
        for name in own:
            for _, shape, size in self._source.stored_sizes(frozenset({self._tied})):
                yield name, shape, size

    @property
    def companions(self) -> CompanionRule:
        return self._source.companions

    def stored_config(self) -> dict[str, Any]:
        return self._source.stored_config()

    def unused(self) -> list[str]:
        return self._source.unused()

    def carried(self) -> dict[str, StoredTensor]:
        return self._source.carried()

    def fingerprint(self) -> str:
        kept = "" if self.online is None else ", head tied"
        text = f"{self._source.fingerprint()} residual rotation 1, seed {self.rotation.seed}{kept}"
        return hashlib.sha256(text.encode()).hexdigest()

    # -- one tensor --------------------------------------------------------------------------------------------------

    def _own_head(self, names: frozenset[str]) -> frozenset[str]:
        """The head's weight, if it is asked for and the checkpoint does not have it."""
        return names & {self._head} if self._tied else frozenset()

    def _portions(self, names: frozenset[str]) -> list[frozenset[str]]:
        """The names so that no list of experts is asked for as a whole: fused tensors would not be taken apart."""
        lists = (frozenset(n for n in names if n.startswith(f"{where}.")) for where in expert_lists(self.skeleton))
        single = frozenset(min(group) for group in lists if group & self._parts.keys())
        return [part for part in (names - single, single) if part]

    def _raw(self, name: str) -> Tensor:
        """A tensor of the checkpoint as it is stored.

        Raises:
            ModelError: it is stored in another form than the model's.
        """
        found = [tensor for _, parameter, tensor in self._source.raw_tensors(frozenset({name})) if parameter == name]
        if len(found) != 1 or found[0].shape != get_parameter(self.skeleton, name).shape:
            raise _other_form(name)
        return found[0]

    def _changed_raw(self, key: str, name: str, tensor: Tensor) -> Tensor:
        if name not in self._parts:
            return tensor
        if tensor.shape != get_parameter(self.skeleton, name).shape:
            raise _other_form(key)
        return self.changed(name, tensor)

    def changed(self, name: str, tensor: Tensor, weight: Tensor | None = None) -> Tensor:
        """The rotated tensor, in the dtype of ``tensor``; ``weight`` is the original one beside a reader's bias."""
        part = self._parts[name]
        if part.kind == "gain":
            return torch.full_like(tensor, 1.0 - part.offset)
        if part.kind == "shift":
            return torch.zeros_like(tensor) if part.folds else self._carried(part, tensor)
        if part.kind == "read bias":
            return self._bias(part, tensor, weight) if part.bias and part.folds else tensor
        return _rotated(tensor, part.axis, self.rotation, self._gain(part) if part.kind == "read" else None)

    def _gain(self, part: Part) -> Tensor:
        return self._raw(f"{part.norm}.weight").double() + part.offset

    def _carried(self, part: Part, bias: Tensor) -> Tensor:
        """A norm's bias that its readers cannot take over: what they see of it is ``W diag(g) Q^T Q (c / g) = W c``."""
        return self.rotation(bias.double() / self._gain(part)).to(bias.dtype)

    def _bias(self, part: Part, bias: Tensor, weight: Tensor | None) -> Tensor:
        weight = self._raw(part.weight) if weight is None else weight
        shift = self._raw(f"{part.norm}.bias").to(weight.device).double()
        matrix = weight.T if part.axis == 0 else weight  # [out, in]
        return (bias.double() + matrix.double() @ shift).to(bias.dtype)

    def check_carried(self) -> None:
        """Refuse norms whose bias cannot move and is too large beside the gain.

        Raises:
            ModelError: names the first.
        """
        for name, part in self._parts.items():
            if part.kind == "shift" and not part.folds:
                ratio = float((self._raw(name).double() / self._gain(part)).nan_to_num(0.0).abs().max())
                if ratio > _STEEP:
                    raise cannot_rotate(
                        f"{name} is up to {ratio:.3g} times the gain of its channel (limit {_STEEP:g}), and not all "
                        f"that reads {part.norm} has a bias that could take it over"
                    )


def _other_form(name: str) -> ModelError:
    return ModelError(
        f"the tensor {name} is stored in another form than in the model, so it cannot be rotated. Load and save the "
        f"model with transformers once, and give that folder."
    )


def get_parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter by its full name, detached."""
    tensor = model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]]
    assert tensor is not None
    return tensor.detach()


def put_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in a parameter's place."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _rotated(tensor: Tensor, axis: int, rotation: ResidualRotation, gain: Tensor | None) -> Tensor:
    """``Q (g * v)`` of all vectors ``v`` along ``axis``, in the tensor's dtype; a part of them in float64 at a time."""
    vectors = tensor.movedim(axis, -1)
    result = torch.empty_like(tensor)
    target = result.movedim(axis, -1)
    if tensor.ndim == 1:
        vectors, target = vectors[None], target[None]
    rows = max(1, _CHUNK // vectors.shape[-1])
    gain = None if gain is None else gain.to(tensor.device)
    for start in range(0, len(vectors), rows):
        piece = vectors[start : start + rows].double()
        target[start : start + rows] = rotation(piece if gain is None else piece * gain).to(tensor.dtype)
    return result

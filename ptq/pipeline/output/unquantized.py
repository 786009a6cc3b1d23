"""What passes through a quantization unchanged and lies outside the blocks, in parts of a bounded size.

A vision tower can be larger than a block, so what is written at once is bounded: memory holds one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safetensors import safe_open
from torch import Tensor, nn

from calib.checkpoint.safetensors_header import StoredTensor
from ptq.pipeline.preparation.sizes import NOT_IN_MODEL, model_tensor

__all__ = ["OUTSIDE", "carried_parts", "outside_parts", "read_tensors"]

OUTSIDE = "outside the blocks"
_LARGE_TENSOR = 1 << 29  # bytes of a tensor that gets a part of its own
_PART_BYTES = 1 << 30


def outside_parts(model: nn.Module, names: frozenset[str]) -> dict[str, frozenset[str]]:
    """The tensors outside the blocks by part.

    Large tensors come one by one. The others are together up to `_PART_BYTES`; what lies in one numbered module (a
    block of a vision tower) is not taken apart, because a checkpoint may store it in one tensor.

    Args:
        model: the skeleton.
        names: full names of the tensors.
    """
    found = {name: model_tensor(model, name) for name in sorted(names)}
    sizes = {name: 0 if tensor is None else tensor.nbytes for name, tensor in found.items()}
    large = [name for name, size in sizes.items() if size > _LARGE_TENSOR]
    units: dict[str, list[str]] = {}
    for name in sorted(names - set(large)):
        units.setdefault(_unit(name), []).append(name)
    parts = {f"{OUTSIDE}: {name}": frozenset({name}) for name in large}
    weights = {unit: sum(sizes[name] for name in members) for unit, members in units.items()}
    for number, chosen in enumerate(_packed(weights)):
        members = frozenset(name for unit in chosen for name in units[unit])
        parts[OUTSIDE if number == 0 else f"{OUTSIDE}, {number + 1}"] = members
    return parts or {OUTSIDE: frozenset()}


def carried_parts(carried: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """The tensors that are no part of the model, by part."""
    packed = _packed({name: tensor.nbytes for name, tensor in carried.items()})
    return {NOT_IN_MODEL if i == 0 else f"{NOT_IN_MODEL}, {i + 1}": names for i, names in enumerate(packed)}


def read_tensors(carried: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint as they are stored."""
    found = {}
    for name in names:
        with safe_open(carried[name].file, framework="pt") as handle:
            found[name] = handle.get_tensor(name)
    return found


def _unit(name: str) -> str:
    """The name up to its first number, that included; empty for a tensor that lies in no numbered module."""
    pieces = name.split(".")
    numbers = [i for i, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[: numbers[0] + 1]) if numbers else ""


def _packed(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, as many together as fit into a part."""
    parts: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not parts or total + size > _PART_BYTES:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += size
    return parts

"""A weight that a checkpoint stores as several tensors, and what is said of all of them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError

__all__ = ["PackedWeight", "SourceQuantization", "find", "require_shape"]


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight of the dense model and how it comes out of the files.

    Args:
        name: of the dense weight, e.g. ``model.layers.0.mlp.up_proj.weight``.
        parts: the names of the tensors that it is made of, by their role.
        shape: of the dense weight.
        bits: of one stored code.
        dequantize: from the parts by role to the dense weight, float32.
        type: what is stored, for people: ``int4 g128``.
    """

    name: str
    parts: Mapping[str, str]
    shape: tuple[int, ...]
    bits: int
    dequantize: Callable[[Mapping[str, Tensor]], Tensor]
    type: str


@dataclasses.dataclass(frozen=True)
class SourceQuantization:
    """What is known of the quantization that a source model already has.

    Args:
        method: the ``quant_method`` of its config.
        bits: of a code, on average over the quantized weights; scales and zero points are not counted.
        weights: number of weights that are dequantized.
        dtype: that they are dequantized to.
    """

    method: str
    bits: float
    weights: int
    dtype: str

    @classmethod
    def of(cls, method: str, packed: Iterable[PackedWeight], dtype: str) -> SourceQuantization:
        sizes = [(math.prod(weight.shape), weight.bits) for weight in packed]
        bits = sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes)
        return cls(method, round(bits, 3), len(sizes), dtype)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"the model is quantized already ({self.method}, {self.bits:g} bits, {self.weights} weights): they are "
            f"dequantized to {self.dtype} block by block as they are read, and what that rounding cost stays"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find(stored: Mapping[str, StoredTensor], prefix: str, role: str) -> StoredTensor:
    """The tensor ``prefix.role``, which must be there.

    Raises:
        ModelError: it is not.
    """
    found = stored.get(f"{prefix}.{role}")
    if found is None:
        raise ModelError(
            f"{prefix} is quantized, but its {role} is missing in the checkpoint. Is the download complete?"
        )
    return found


def require_shape(name: str, stored: StoredTensor, shape: tuple[int, ...], why: str) -> None:
    """Refuse a tensor of another shape than the format gives it.

    Raises:
        ModelError: names it, both shapes and the reason.
    """
    if stored.shape != shape:
        raise ModelError(
            f"{name} has the shape {list(stored.shape)} in {stored.file}, but {why} makes it {list(shape)}. Do config "
            "and weights belong together?"
        )

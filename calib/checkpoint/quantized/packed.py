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


_WORDS = ("I32", "U32")
_FLOATS = ("F16", "BF16", "F32", "F64")
_DTYPES = {
    **dict.fromkeys(("qweight", "qzeros", "weight_zero_point"), (*_WORDS, "I8")),
    "weight_packed": (*_WORDS, "U8"),
    **dict.fromkeys(("scales", "weight_global_scale"), _FLOATS),
    "weight_scale": (*_FLOATS, "U8", "F8_E4M3", "F8_E8M0"),
    **dict.fromkeys(("g_idx", "weight_shape"), ("I32", "I64")),
}
"""What the parts of a packed weight are stored as, by role; others are not looked at."""


def find(stored: Mapping[str, StoredTensor], prefix: str, role: str) -> StoredTensor:
    """The tensor ``prefix.role``, which must be there.

    Raises:
        ModelError: it is not, or is stored as something else than such a part is.
    """
    found = stored.get(f"{prefix}.{role}")
    if found is None:
        raise ModelError(
            f"{prefix} is quantized, but its {role} is missing in the checkpoint. Is the download complete?"
        )
    if found.dtype not in _DTYPES.get(role, (found.dtype,)):
        raise ModelError(
            f"{prefix}.{role} is stored as {found.dtype} in {found.file}, and ptq reads {', '.join(_DTYPES[role])}. Is "
            "the checkpoint damaged?"
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

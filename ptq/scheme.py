"""What the user asks of one linear: how its weight is stored, and what happens to its input before the product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ptq.activation_formats import ActivationFormat, find_activation_format
from ptq.errors import UsageError, unknown_name
from ptq.grids.storage import MAX_BITS, MIN_BITS, SCALE_DTYPES
from ptq.number_formats import NumberFormat, TensorSpec, find_number_format

__all__ = ["MAX_BITS", "MIN_BITS", "SCALE_DTYPES", "KeyValueScheme", "Rotation", "Scheme", "check_dynamic"]

ROTATION_KINDS = ("hadamard", "hadamard-unsigned")
ROTATION_BLOCKS = (32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The rotation of a linear's input as data (`ptq.transforms.hadamard.InputRotation` computes it).

    Args:
        seed: of the random signs; linears that read the same input have the same one.
        block: the largest block, a power of two from 32 to 1024; what it leaves of a width is cut into smaller powers
            of two. ``None`` takes the largest blocks that divide the width.
        kind: ``hadamard``, a Walsh-Hadamard transform of inputs with random signs, or ``hadamard-unsigned``, the same
            without signs (its seed is 0).

    Raises:
        UsageError: a value outside the limits above.
    """

    seed: int = 0
    block: int | None = None
    kind: str = "hadamard"

    def __post_init__(self) -> None:
        if self.kind not in ROTATION_KINDS:
            raise unknown_name("kind of input rotation", str(self.kind), ROTATION_KINDS)
        seed, block = self.seed, self.block
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UsageError(
                f"input_rotation must be a seed from 0 to 2^63 - 1, or None for no rotation; got {seed!r}."
            )
        if block is not None and (block not in ROTATION_BLOCKS or isinstance(block, bool)):
            raise UsageError(
                f"the block of a rotation (--rotate-block) must be one of {', '.join(map(str, ROTATION_BLOCKS))}; got "
                f"{block!r}."
            )
        if self.kind == "hadamard-unsigned" and seed:
            raise UsageError(f"a rotation without signs has the seed 0, got {seed!r}.")

    @classmethod
    def of(cls, data: object) -> Rotation | None:
        """A rotation from a seed or from plain data; rotations and ``None`` as they are.

        Raises:
            UsageError: a key or value that a rotation does not have.
        """
        if data is None or isinstance(data, Rotation):
            return data
        if not isinstance(data, Mapping):
            return cls(data)  # type: ignore[arg-type]  # checked there
        for key in data:
            if key not in ("seed", "block", "kind"):
                raise unknown_name("key of input_rotation", str(key), ("seed", "block", "kind"))
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The storage of one linear's weight ``[out_features, in_features]``, and the transform of its input.

    Args:
        bits: width of one code, 2 to 8.
        symmetric: integer levels ``-2^(bits-1) .. 2^(bits-1)-1`` around a fixed zero; otherwise every group stores an
            integer zero point of ``bits`` bits.
        group_size: consecutive input channels that share a scale, e.g. 64 gives ``ceil(in_features / 64)`` scales a
            row (the last group may be shorter); ``None`` is one scale a row (per channel).
        scale_dtype: dtype in which scales are stored, ``"float16"`` or ``"bfloat16"``; ``"auto"`` becomes bfloat16
            for a bfloat16 model (stock loaders would round other scales to that) and float16 for any other
            (`resolved`).
        act_bits: width, 2 to 8, to which every input vector is rounded at run time, with a range of its own
            (`ptq.runtime.activations.quantize_tokens`); ``None`` leaves inputs as they are.
        act_symmetric: the inputs' grid has its zero in the middle; otherwise an integer zero point a vector.
        input_rotation: rotation of the input at run time; the weight is stored rotated, so that the product is the
            same. A seed alone or plain data is taken, too; ``None`` is no rotation.
        format: the number format, a name of `ptq.number_formats.FORMATS`; `Scheme.of` starts from its defaults.
        act_format: how the input is rounded at run time, a name of `ptq.activation_formats.ACTIVATION_FORMATS`;
            ``None`` leaves it to ``act_bits``, which cannot be given beside it.

    Raises:
        UsageError: a value outside the limits above.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = 64
    scale_dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    act_bits: int | None = None
    act_symmetric: bool = False
    input_rotation: Rotation | None = None
    format: str = "int"
    act_format: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise UsageError(f"symmetric must be true or false, got {self.symmetric!r}.")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}.")
        check_dynamic("act", "the inputs of linears", self.act_bits, self.act_symmetric)
        object.__setattr__(self, "input_rotation", Rotation.of(self.input_rotation))
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise UsageError(
                f"group_size must be a positive number of input channels, or None (0 on the command line) for one "
                f"scale per output channel; got {self.group_size!r}."
            )
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}.")
        if self.act_format is not None:
            find_activation_format(self.act_format)
            if self.act_bits is not None:
                raise UsageError(
                    f"act_format={self.act_format!r} and act_bits={self.act_bits!r} both say how inputs are rounded: "
                    "give one of them."
                )
        self.number_format.check(self)

    @classmethod
    def of(cls, format: str, **changes: Any) -> Scheme:
        """The scheme of a number format: its defaults, with ``changes`` to single fields.

        Raises:
            UsageError: an unknown format, or a value that it does not take.
        """
        return cls(**{**find_number_format(format).defaults, "format": format, **changes})

    def fitting(self, shape: Sequence[int]) -> Scheme:
        """The scheme, or the one that its number format has for weights of other shapes than it takes.

        Args:
            shape: of the weight, ``[out, in]``.
        """
        record = self.number_format
        if not record.fallback or record.unsupported_reason(shape[0], shape[1], self) is None:
            return self
        fields = dict(record.fallback)
        for field in ("act_bits", "act_symmetric", "act_format", "input_rotation"):
            fields[field] = getattr(self, field)
        return Scheme.of(fields.pop("format"), **fields)

    @property
    def number_format(self) -> NumberFormat:
        """The record of the weight's number format."""
        return find_number_format(self.format)

    @property
    def activation_format(self) -> ActivationFormat | None:
        """The record of the input's format, if ``act_format`` names one."""
        return None if self.act_format is None else find_activation_format(self.act_format)

    @property
    def calibrates_input(self) -> bool:
        """Whether parameters of the input's format come from calibration."""
        return self.activation_format is not None and self.activation_format.static

    def input_specs(self, in_features: int) -> dict[str, TensorSpec]:
        """Shape and dtype of the stored parameters of the input's format, by bare name."""
        return {} if self.activation_format is None else self.activation_format.tensor_specs(in_features)

    def resolved(self, model_dtype: torch.dtype) -> Scheme:
        """The scheme with ``scale_dtype`` settled for a model of that dtype."""
        if self.scale_dtype != "auto":
            return self
        return dataclasses.replace(self, scale_dtype="bfloat16" if model_dtype == torch.bfloat16 else "float16")

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of ``in_features`` weights."""
        return 1 if self.group_size is None else math.ceil(in_features / self.group_size)

    def group_index(self, in_features: int, device: torch.device | None = None) -> Tensor:
        """Group of every input channel, int64 ``[in_features]``."""
        size = in_features if self.group_size is None else self.group_size
        return torch.arange(in_features, device=device) // size

    def describe(self) -> str:
        """Short name for tables and logs, e.g. ``"int3 sym g64"`` or ``"int4 sym per channel a4 rotated"``."""
        text = self.number_format.describe(self)
        if self.act_bits is not None:
            text += f" a{self.act_bits}{' sym' if self.act_symmetric else ''}"
        if self.act_format is not None:
            text += f" a-{self.act_format}"
        return text if self.input_rotation is None else f"{text} rotated"

    @property
    def transforms_input(self) -> bool:
        """Whether the runtime must do anything to the linear's input: quantize it or rotate it."""
        return self.rounds_input or self.input_rotation is not None

    @property
    def rounds_input(self) -> bool:
        """Whether the linear's input is rounded at run time."""
        return self.act_bits is not None or self.act_format is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: all fields."""
        return dataclasses.asdict(self)

    def record(self) -> dict[str, Any]:
        """What reports state: all fields, and ``name``, the short name for people."""
        return self.to_dict() | {"name": self.describe()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_dict` and `record`; fields that are missing have the number format's defaults.

        Raises:
            UsageError: a value that a field refuses.
            TypeError: an unknown field.
        """
        fields = {key: value for key, value in data.items() if key != "name"}
        return cls.of(fields.pop("format", "int"), **fields)


@dataclasses.dataclass(frozen=True)
class KeyValueScheme:
    """How keys (after rotary) and values are rounded: every token and head with a range of its own.

    Args:
        bits: 2 to 8.
        symmetric: a grid with its zero in the middle; otherwise an integer zero point a token and head.
        share: the share of a head's channels that are rounded (`ptq.runtime.activations.quantize_tokens`); below 1
            only while a method learns, and not part of a checkpoint.

    Raises:
        UsageError: a value outside these limits.
    """

    bits: int
    symmetric: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        check_dynamic("kv", "keys and values", self.bits, self.symmetric)
        if self.bits is None:
            raise UsageError(f"kv_bits is missing: give a whole number from {MIN_BITS} to {MAX_BITS}.")
        if not 0 <= self.share <= 1:
            raise UsageError(
                f"the share of a head's channels that are rounded must be from 0 to 1, got {self.share!r}."
            )

    def describe(self) -> str:
        """Short name for tables and logs, e.g. ``"kv4"`` or ``"kv8 sym"``."""
        return f"kv{self.bits}{' sym' if self.symmetric else ''}"

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says (see `ptq.containers.native`)."""
        return {"bits": self.bits, "symmetric": self.symmetric}


def check_dynamic(prefix: str, what: str, bits: object, symmetric: object) -> None:
    """Check a pair of fields ``<prefix>_bits`` and ``<prefix>_symmetric`` of quantization at run time.

    Raises:
        UsageError: bits that are neither ``None`` nor 2 to 8, or a sign that is not a truth value or has no bits.
    """
    if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS):
        raise UsageError(
            f"{prefix}_bits must be a whole number from {MIN_BITS} to {MAX_BITS}, or None to leave {what} as they are; "
            f"got {bits!r}."
        )
    if not isinstance(symmetric, bool):
        raise UsageError(f"{prefix}_symmetric must be true or false, got {symmetric!r}.")
    if symmetric and bits is None:
        raise UsageError(
            f"{prefix}_symmetric (--{prefix}-sym) says how to quantize {what}, and {prefix}_bits (--{prefix}-bits) is "
            f"not set: give both."
        )

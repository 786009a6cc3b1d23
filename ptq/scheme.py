"""What the user asks of one linear's weight: the grid, the bits, the groups, the dtype of the scales."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ptq.errors import UsageError

__all__ = ["MAX_BITS", "MIN_BITS", "SCALE_DTYPES", "Scheme"]

MIN_BITS, MAX_BITS = 2, 8
SCALE_DTYPES: dict[str, torch.dtype] = {"auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The storage of one linear's weight ``[out_features, in_features]``.

    Args:
        bits: width of one code, 2 to 8.
        symmetric: integer levels ``-2^(bits-1) .. 2^(bits-1)-1`` around a fixed zero; otherwise every group stores an
            integer zero point of ``bits`` bits.
        group_size: consecutive input channels that share a scale, e.g. 64 gives ``ceil(in_features / 64)`` scales a
            row (the last group may be shorter); ``None`` is one scale a row (per channel).
        scale_dtype: dtype in which scales are stored, ``"float16"`` or ``"bfloat16"``; ``"auto"`` becomes bfloat16
        for a
            bfloat16 model (stock loaders would round other scales to that) and float16 for any other (`resolved`).

    Raises:
        UsageError: a value outside the limits above.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = 64
    scale_dtype: Literal["auto", "float16", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise UsageError(f"symmetric must be true or false, got {self.symmetric!r}.")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}.")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise UsageError(
                f"group_size must be a positive number of input channels, or None (0 on the command line) for one "
                f"scale per output channel; got {self.group_size!r}."
            )
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}.")

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
        """Short name for tables and logs, e.g. ``"int3 sym g64"``."""
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {group}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

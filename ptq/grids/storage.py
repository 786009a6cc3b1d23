"""What grids and number formats need to know of a scheme: a structural type, so that they stand below `ptq.scheme`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "MIN_BITS", "SCALE_DTYPES", "Storage"]

MIN_BITS, MAX_BITS = 2, 8
SCALE_DTYPES: dict[str, torch.dtype] = {"auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Storage(Protocol):
    """The fields of `ptq.scheme.Scheme` that describe a stored weight."""

    @property
    def format(self) -> str:
        """The number format's name."""

    @property
    def bits(self) -> int:
        """Width of one code."""

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no stored zero point."""

    @property
    def group_size(self) -> int | None:
        """Consecutive input channels per scale; ``None`` is one scale per row."""

    @property
    def scale_dtype(self) -> Any:
        """Name of the scales' dtype, a key of `SCALE_DTYPES`."""

    def groups(self, in_features: int) -> int:
        """Number of groups in a row."""

    def group_index(self, in_features: int, device: torch.device | None = None) -> Tensor:
        """Group of every input channel, int64 ``[in_features]``."""

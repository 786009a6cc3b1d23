"""What the number formats for rotated weights have in common: fixed fields of a scheme, and the way to the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.grids import SMALLEST_STEP, ScaledGrid, Storage
from ptq.grids.codebooks import symmetric_levels
from ptq.grids.sub_block_scales import SubBlockLayout

__all__ = ["BLOCK", "ROTATED", "check_fixed", "sub_block_grid"]

BLOCK = 256
ROTATED = {
    "symmetric": True,
    "group_size": BLOCK,
    "scale_dtype": "float16",
    "input_rotation": {"kind": "hadamard", "seed": 0, "block": BLOCK},
}
"""Fields of a scheme that all of them begin with."""


def check_fixed(name: str, scheme: Storage, bits: tuple[int, ...]) -> None:
    """Check the fields that a codebook leaves no choice for.

    Raises:
        UsageError: a field has another value.
    """
    if scheme.bits not in bits:
        widths = " or ".join(map(str, bits))
        raise UsageError(f"the number format {name} has codes of {widths} bits, got bits={scheme.bits!r}.")
    if not scheme.symmetric:
        raise UsageError(
            f"the number format {name} is a symmetric codebook and has no zero points: leave out --asym "
            "(symmetric=False)."
        )
    if scheme.group_size != BLOCK:
        raise UsageError(
            f"the number format {name} has one scale per {BLOCK} input channels, got group_size={scheme.group_size!r}: "
            f"leave out --group-size. (The size of the rotation's blocks is --rotate-block.)"
        )
    if scheme.scale_dtype != "float16":
        raise UsageError(
            f"the number format {name} stores its scales in float16, got scale_dtype={scheme.scale_dtype!r}: leave out "
            "--scale-dtype."
        )


def sub_block_grid(
    scale: Tensor, index: Tensor, layout: SubBlockLayout, in_features: int, params: dict[str, Tensor]
) -> ScaledGrid:
    """The grid of a weight with scales of two levels."""
    effective = layout.expand(scale, index).clamp_(min=SMALLEST_STEP)
    group = torch.arange(in_features, device=scale.device) // layout.sub
    levels = symmetric_levels(layout.magnitudes, scale.device)
    return ScaledGrid(levels, effective, torch.zeros_like(effective), group, params)

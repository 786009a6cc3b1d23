"""A grid answers one question: which representable value is nearest to this number?

Every grid of the toolkit has the form ``value = scale * (level[code] - zero)`` with an ascending table of levels. The
integer grids are the table 0, 1, 2, ...; floating-point and codebook grids are other tables. Solvers see only
`ScaledGrid`, so none of them can assume equal steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import NumericalError

__all__ = ["SMALLEST_STEP", "Grid", "ScaledGrid", "check_finite", "uniform_grid"]

SMALLEST_STEP = 2.0**-100
"""Stands for a step of zero, by which a grid must not be divided."""


def check_finite(found: Tensor) -> None:
    """Check what was computed from a weight before scales are fitted to it.

    Raises:
        NumericalError: it holds NaN or Inf.
    """
    if not bool(torch.isfinite(found).all()):
        raise NumericalError("the weight, or the target it was corrected to, holds NaN or Inf; more damping may help.")


@dataclasses.dataclass(frozen=True)
class Grid:
    """An ascending table of levels, before scaling.

    Args:
        levels: float32 ``[L]``, strictly ascending, ``L <= 256`` so that codes fit in uint8.
        uniform: the levels are ``0, 1, ..., L-1``; allows rounding by arithmetic instead of a search.
    """

    levels: Tensor
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.levels.ndim != 1 or not 2 <= len(self.levels) <= 256:
            raise ValueError(f"a grid has 2 to 256 levels in one dimension, got shape {tuple(self.levels.shape)}")
        if not torch.compiler.is_compiling() and not bool((self.levels.diff() > 0).all()):
            raise ValueError("the levels of a grid must be strictly ascending")

    def nearest(self, x: Tensor) -> Tensor:
        """Code (uint8, the shape of ``x``) of the level nearest to ``x`` in units of the scale, zero already added."""
        top = len(self.levels) - 1
        if self.uniform:
            return x.round().clamp_(0, top).to(torch.uint8)
        levels = self.levels.to(x)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def snap(self, x: Tensor) -> Tensor:
        """The level nearest to ``x``, float32: `nearest` and `values` in one step, for loops that need no codes."""
        if self.uniform:
            return x.round().clamp_(0, len(self.levels) - 1)
        return self.values(self.nearest(x))

    def codes_of(self, levels: Tensor) -> Tensor:
        """Codes, uint8, of numbers that are levels (as `snap` gives them)."""
        if self.uniform:
            return levels.to(torch.uint8)
        return torch.searchsorted(self.levels.to(levels), levels.contiguous()).to(torch.uint8)

    def nearest_several(self, x: Tensor, count: int) -> Tensor:
        """The ``count`` nearest codes of every entry of ``x``, uint8 ``[*x.shape, count]``, ascending.

        In a sorted table the nearest ``count`` levels are neighbours, so one start index names them all.
        """
        total = len(self.levels)
        if self.uniform:
            start = (x - (count - 1) / 2).round().clamp_(0, total - count)
        else:
            # The window [i, i + count) beats its right neighbour while x is below the middle of level i and i + count.
            levels = self.levels.to(x)
            start = torch.bucketize(x, (levels[: total - count] + levels[count:]) / 2).to(x.dtype)
        window = torch.arange(count, device=x.device, dtype=x.dtype)
        return (start.unsqueeze(-1) + window).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """Levels of ``codes``, float32."""
        if self.uniform:
            return codes.float()
        return self.levels.to(codes.device)[codes.long()]


def uniform_grid(bits: int, device: torch.device | None = None) -> Grid:
    """The integer grid of ``2^bits`` equal steps."""
    return Grid(torch.arange(2**bits, dtype=torch.float32, device=device), uniform=True)


@dataclasses.dataclass(frozen=True)
class ScaledGrid:
    """A grid with the scales of one weight: what a solver rounds onto.

    Args:
        grid: the table of levels.
        scale: float32 ``[out, groups]``, finite; a negative scale mirrors the grid, zero is not allowed.
        zero: float32 ``[out, groups]``, in units of levels.
        group: int64 ``[in]``, the group of every input channel.
        params: the stored parameters of the number format from which scale and zero follow; what a
            `ptq.QuantizedWeight` on this grid keeps.
    """

    grid: Grid
    scale: Tensor
    zero: Tensor
    group: Tensor
    params: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Neighbouring columns of a row that one code stands for; above 1 only in subclasses (vector codebooks), which
        override `round_columns` and `value_columns`."""
        return 1

    def round_columns(self, values: Tensor, start: int) -> Tensor:
        """Codes ``[out]`` of the tuple of columns ``[out, columns]`` that begins at ``start``."""
        scale, zero = self.scale_of(start, start + 1)
        return self.grid.nearest(values / scale + zero)[:, 0]

    def value_columns(self, codes: Tensor, start: int) -> Tensor:
        """Values ``[out, columns]`` of the codes ``[out]`` of the tuple that begins at ``start``."""
        scale, zero = self.scale_of(start, start + 1)
        return (self.grid.values(codes[:, None]) - zero) * scale

    def permuted(self, order: Tensor) -> ScaledGrid:
        """The same grid for columns taken in ``order`` (int64 ``[in]``)."""
        return dataclasses.replace(self, group=self.group[order])

    def scale_of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of columns ``start .. stop``, each ``[out, stop - start]``."""
        group = self.group[start:stop]
        return self.scale.index_select(1, group), self.zero.index_select(1, group)

    def rows(self, start: int, stop: int) -> ScaledGrid:
        """The grid of some rows."""
        return dataclasses.replace(self, scale=self.scale[start:stop], zero=self.zero[start:stop])

    def round(self, weight: Tensor) -> Tensor:
        """Nearest codes of a whole weight ``[out, in]``, uint8."""
        scale, zero = self.scale_of(0, weight.shape[1])
        return self.grid.nearest(weight / scale + zero)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes ``[out, in]``, float32."""
        scale, zero = self.scale_of(0, codes.shape[1])
        return (self.grid.values(codes) - zero) * scale

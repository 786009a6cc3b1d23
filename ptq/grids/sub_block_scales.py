"""Scales of two levels: a float16 scale per block of a row and, below it, a small integer per sub-block.

    value = scale[block] * multiplier[sub-block] * level

The search is for the scale and the multipliers with the least squared error ``sum_j h_j (w_j - value_j)^2``. First
every combination is scored from a table: steps lie on a logarithmic lattice, a row of the table holds the squared
errors at all steps of a weight of one size, and a sub-block's scores are the sum of its weights' rows
(`torch.nn.functional.embedding_bag`). A multiplier is then an offset on the lattice, and a block's score at a scale is
the sum over its sub-blocks of their best offsets. From the best scale a few exact rounds follow: best multipliers, then
the scale by least squares, rounded as it is stored.

Without multipliers (``(1,)``) it is the search for one scale per block.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.grids.grid import check_finite

__all__ = ["SubBlockLayout", "check_half", "fit_sub_block_scales"]

_STEP = math.log(15 / 8) / 31  # of the lattice: 15, 12, 10 and 8 are 31, 20, 11 and 0 steps, to a thousandth
_BELOW, _ABOVE = 45, 60  # effective scales searched, in steps around the one that is best for Gaussian weights
_POSITIONS, _LARGEST = 64, 16  # rows of the table per standard deviation, and how many of these
_ROUNDS = 3
_CHUNK, _DEVICE_CHUNK = 1 << 19, 1 << 24  # weights searched at once


@dataclasses.dataclass(frozen=True)
class SubBlockLayout:
    """How the scales of a row are laid out.

    Args:
        block: consecutive columns per float16 scale; the last block of a row may be shorter.
        sub: consecutive columns per multiplier; divides ``block``.
        multipliers: positive integers that a sub-block can choose from.
        magnitudes: of the symmetric codebook, ascending.
        step: the effective scale that is best for Gaussian weights of variance 1.
    """

    block: int
    sub: int
    multipliers: tuple[int, ...]
    magnitudes: tuple[float, ...]
    step: float

    def blocks(self, width: int) -> int:
        """Scales per row."""
        return math.ceil(width / self.block)

    def subs(self, width: int) -> int:
        """Multipliers per row."""
        return math.ceil(width / self.sub)

    def expand(self, scale: Tensor, index: Tensor) -> Tensor:
        """Effective scale of every sub-block, float32 ``[out, subs]``.

        Args:
            scale: ``[out, blocks]``.
            index: of the multipliers, integers ``[out, subs]``.
        """
        of_block = torch.arange(index.shape[1], device=index.device) * self.sub // self.block
        factors = torch.tensor(self.multipliers, dtype=torch.float32, device=index.device)
        return scale.float().index_select(1, of_block) * factors[index.long()]


def fit_sub_block_scales(
    target: Tensor, layout: SubBlockLayout, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and multipliers of a weight.

    Args:
        target: float32 ``[out, in]``, not changed.
        layout: of the scales.
        importance: float32 ``[in]``, weight of each column's squared error; ``None`` weighs all alike.

    Returns:
        ``scale`` float16 ``[out, blocks]``, zero for blocks of zeros, and ``index`` uint8 ``[out, subs]``.

    Raises:
        NumericalError: a weight is not finite, or a scale overflows float16.
    """
    out, width = target.shape
    scale = torch.empty(out, layout.blocks(width), dtype=torch.float16, device=target.device)
    index = torch.empty(out, layout.subs(width), dtype=torch.uint8, device=target.device)
    full = width // layout.block * layout.block
    for start, stop in ((0, full), (full, width)):
        if start < stop:
            size = min(layout.block, stop - start)
            blocks = slice(start // layout.block, math.ceil(stop / layout.block))
            subs = slice(start // layout.sub, math.ceil(stop / layout.sub))
            part = None if importance is None else importance[start:stop]
            scale[:, blocks], index[:, subs] = _fit_blocks(target[:, start:stop], part, size, layout)
    return scale, index


def _fit_blocks(target: Tensor, importance: Tensor | None, size: int, layout: SubBlockLayout) -> tuple[Tensor, Tensor]:
    """`fit_sub_block_scales` where all blocks have ``size`` columns."""
    out, width = target.shape
    ragged = -size % layout.sub
    if ragged:  # one last block: columns that do not exist must not count, zero is no level
        importance = target.new_ones(width) if importance is None else importance
        target, importance = (torch.nn.functional.pad(part, (0, ragged)) for part in (target, importance))
        width = size = width + ragged
    subs = size // layout.sub
    weights = target.reshape(-1, subs, layout.sub)  # [out * blocks, subs, sub]
    shared = None if importance is None else importance.clamp(min=0).view(-1, subs, layout.sub)  # [blocks, subs, sub]
    scale = torch.empty(len(weights), dtype=torch.float16, device=target.device)
    index = torch.empty(len(weights), subs, dtype=torch.uint8, device=target.device)
    blocks = width // size
    rows = max(1, (_CHUNK if target.device.type == "cpu" else _DEVICE_CHUNK) // width) * blocks
    for start in range(0, len(weights), rows):
        part = weights[start : start + rows]
        h = None if shared is None else shared.repeat(len(part) // blocks, 1, 1)
        scale[start : start + rows], index[start : start + rows] = _search(part, h, layout)
    return scale.view(out, blocks), index.view(out, blocks * subs)


def _search(weights: Tensor, h: Tensor | None, layout: SubBlockLayout) -> tuple[Tensor, Tensor]:
    """Scale float16 ``[n]`` and multipliers uint8 ``[n, subs]`` of blocks ``[n, subs, sub]``."""
    rms = weights.square().mean((1, 2)).sqrt_()
    check_finite(rms)
    scale = _stored(_guess(weights, h, rms, layout), rms)
    best = _Best(weights, h, layout)
    for _ in range(_ROUNDS):
        index, levels = best.multipliers(scale)
        scale = _stored(best.offer(scale, index, levels), rms)
    index, levels = best.multipliers(scale)
    best.offer(scale, index, levels)
    return best.scale.to(torch.float16), best.index


def check_half(scale: Tensor) -> None:
    """Check scales before they are stored as float16.

    Raises:
        NumericalError: one overflows.
    """
    if bool((scale > torch.finfo(torch.float16).max).any()):
        raise NumericalError(
            f"the scale of a block overflows float16 ({float(scale.max()):.3g}, the largest is 65504): the weights are "
            "too large for this number format. The checkpoint may be damaged."
        )


def _stored(scale: Tensor, rms: Tensor) -> Tensor:
    """The scale as float16 stores it, in float32: never zero for a block that is not."""
    check_half(scale)
    smallest = 2.0**-24  # of the subnormal numbers
    return torch.where(rms > 0, scale.clamp(min=smallest), 0.0).to(torch.float16).float()


def _guess(weights: Tensor, h: Tensor | None, rms: Tensor, layout: SubBlockLayout) -> Tensor:
    """The scale with the least error by the table, ``[n]``."""
    count, subs, sub = weights.shape
    unit = torch.where(rms > 0, rms, torch.ones_like(rms))
    position = (weights / unit[:, None, None]).abs_().mul_(_POSITIONS).round_().clamp_(max=_POSITIONS * _LARGEST)
    table = _table(layout.magnitudes, layout.step, weights.device)
    score = torch.nn.functional.embedding_bag(
        position.to(torch.int32).view(count * subs, sub),
        table,
        mode="sum",
        per_sample_weights=None if h is None else h.reshape(count * subs, sub),
    )
    least = min(layout.multipliers)
    offsets = [round(math.log(m / least) / _STEP) for m in layout.multipliers]
    tried = table.shape[1] - max(offsets)
    best: Tensor = score[:, offsets[0] : offsets[0] + tried]
    for offset in offsets[1:]:
        best = torch.minimum(best, score[:, offset : offset + tried])
    chosen = best.view(count, subs, tried).sum(1).argmin(-1)
    return unit * torch.exp((chosen - _BELOW) * _STEP) * (layout.step / least)


@functools.lru_cache(maxsize=16)
def _table(magnitudes: tuple[float, ...], step: float, device: torch.device) -> Tensor:
    """Squared error of weights of every size at every effective scale, float32 ``[positions, scales]``, in units of
    the block's standard deviation."""
    sizes = torch.arange(_POSITIONS * _LARGEST + 1, dtype=torch.float64)[:, None] / _POSITIONS
    scales = step * torch.exp(torch.arange(-_BELOW, _ABOVE + 1, dtype=torch.float64) * _STEP)
    error = torch.full((len(sizes), len(scales)), torch.inf, dtype=torch.float64)
    for magnitude in magnitudes:
        error = torch.minimum(error, (sizes - magnitude * scales).square_())
    return error.float().to(device)


class _Best:
    """The best exactly measured scales and multipliers so far.

    Args:
        weights: blocks ``[n, subs, sub]``.
        h: weights of their squared errors, the same shape or ``None``.
        layout: of the scales.
    """

    def __init__(self, weights: Tensor, h: Tensor | None, layout: SubBlockLayout) -> None:
        self._weights, self._h, self._layout = weights.abs(), h, layout
        self._factors = torch.tensor(layout.multipliers, dtype=torch.float32, device=weights.device)
        magnitudes = torch.tensor(layout.magnitudes, dtype=torch.float32, device=weights.device)
        self._magnitudes, self._middles = magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2
        self.scale = torch.zeros(len(weights), device=weights.device)
        self.index = torch.zeros(weights.shape[:2], dtype=torch.uint8, device=weights.device)
        # A scale of zero stays where any other is worse: weights far below the smallest float16 number.
        self._error = self._total(self._weights.clone(), (1, 2)).mul_(1 + 1e-6).add_(torch.finfo(torch.float32).tiny)

    def multipliers(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The best multiplier of every sub-block at these scales, ``[n, subs]``, and the levels that follow from it."""
        least = torch.full(self.index.shape, torch.inf, device=scale.device)
        index, chosen = torch.zeros_like(self.index), torch.zeros_like(self._weights)
        for number, factor in enumerate(self._factors):
            effective = (scale * factor)[:, None, None]
            levels = self._levels(effective)
            error = self._total(torch.addcmul(self._weights, levels, effective, value=-1.0), -1)
            better = error < least
            least = torch.where(better, error, least)
            index.masked_fill_(better, number)
            chosen = torch.where(better[..., None], levels, chosen)
        return index, chosen

    def offer(self, scale: Tensor, index: Tensor, levels: Tensor) -> Tensor:
        """Keep these where they are better; returns the scales that fit the levels best by least squares."""
        values = levels * self._factors[index.long()][..., None]
        error = self._total(torch.addcmul(self._weights, values, scale[:, None, None], value=-1.0), (1, 2))
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.index = torch.where(better[:, None], index, self.index)
        weighted = values if self._h is None else values * self._h
        fitted = (weighted * self._weights).sum((1, 2)) / (weighted * values).sum((1, 2))
        return torch.where(fitted > 0, fitted, scale)  # not a number where every level or weight is zero

    def _levels(self, effective: Tensor) -> Tensor:
        """The nearest magnitudes, float32."""
        units = self._weights / effective.clamp(min=1e-30)
        return self._magnitudes[torch.bucketize(units, self._middles, out_int32=True)]

    def _total(self, error: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        squared = error.square_()
        return (squared if self._h is None else squared.mul_(self._h)).sum(dims)

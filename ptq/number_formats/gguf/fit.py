"""Scales of llama.cpp's block types by least squares: small integers per sub-block under float16 numbers per block.

Every sub-block first gets the best scale (and minimum) by itself, from a range of candidates. The block's float16
numbers follow from the largest of them, and a few exact rounds choose multipliers and numbers anew for each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.errors import NumericalError

__all__ = ["fit_minima", "fit_signed", "fit_table"]

_FACTORS = torch.linspace(0.66, 1.08, 15).tolist()
_TABLE_FACTORS = torch.linspace(0.6, 1.1, 41).tolist()
_BLOCK_FACTORS = (0.92, 0.96, 1.0, 1.04)
_ROUNDS = 3
_POSITIONS = 512  # rows of a table of errors, on either side of zero
_TINY = 1e-30


def fit_signed(weights: Tensor, h: Tensor, bits: int, lowest: int) -> tuple[Tensor, Tensor]:
    """Block scales float16 ``[n]`` and multipliers ``lowest .. -lowest - 1`` int8 ``[n, subs]``.

    Args:
        weights: float32 ``[n, subs, size]``.
        h: weights of the squared errors, broadcasting against ``weights``.
        bits: of a code; levels are ``-2^(bits-1) .. 2^(bits-1) - 1``.
        lowest: multiplier.
    """
    half = 2 ** (bits - 1)
    single = _best_single(weights, h, half)  # [n, subs]
    largest = single.gather(1, single.abs().argmax(1, keepdim=True))[:, 0]
    best = _Best(len(weights), single.shape, weights.device)
    for factor in _BLOCK_FACTORS:
        scale = _half(largest * factor / lowest)
        for _ in range(_ROUNDS):
            multiplier = _near_multiplier(weights, h, scale, single, half, lowest)
            step = (scale[:, None] * multiplier)[..., None]
            levels = _levels(weights, step, half)
            best.offer(_error(weights, h, levels * step, (1, 2)), scale, multiplier)
            values = levels * multiplier[..., None]
            scale = _half(_quotient((h * values * weights).sum((1, 2)), (h * values.square()).sum((1, 2)), scale))
    return best.scale.to(torch.float16), best.multiplier.to(torch.int8)


def fit_minima(weights: Tensor, h: Tensor, bits: int, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Block scales and minima float16 ``[n]``, multipliers of both ``0 .. top`` uint8 ``[n, subs]``.

    A value is ``scale * multiplier * code - minimum * other multiplier``; arguments as in `fit_signed`.
    """
    levels = 2**bits - 1
    step, low = _best_single_minimum(weights, h, levels)  # [n, subs], low >= 0 is subtracted
    best = _BestPair(len(weights), step.shape, weights.device)
    for factor in _BLOCK_FACTORS:
        scale, minimum = _half(step.amax(1) * factor / top), _half(low.amax(1) / top)
        for _ in range(_ROUNDS):
            m = _ratio(step, scale).round_().clamp_(0, top)
            k = _ratio(low, minimum).round_().clamp_(0, top)
            effective, offset = (scale[:, None] * m)[..., None], (minimum[:, None] * k)[..., None]
            codes = ((weights + offset) / effective.clamp(min=_TINY)).round_().clamp_(0, levels)
            best.offer(_error(weights, h, codes * effective - offset, (1, 2)), scale, minimum, m, k)
            scale, minimum = _two_numbers(
                weights, h, codes * m[..., None], -k[..., None].expand_as(codes), scale, minimum
            )
    return best.scale.half(), best.minimum.half(), best.m.to(torch.uint8), best.k.to(torch.uint8)


def fit_table(weights: Tensor, h: Tensor, table: Tensor) -> Tensor:
    """Scales float16 ``[n]`` of blocks ``[n, size]`` for ascending levels, of either sign.

    Every candidate is scored from a table of squared errors by a weight's size relative to the block's largest one;
    from the best of them a few exact rounds follow.
    """
    extreme = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
    steps = torch.tensor([factor / float(end) for end in (table[0], table[-1]) for factor in _TABLE_FACTORS]).to(
        weights
    )
    middles = (table[1:] + table[:-1]) / 2
    sizes = torch.arange(-_POSITIONS, _POSITIONS + 1, device=weights.device)[:, None] / _POSITIONS
    errors = (table[torch.bucketize(sizes / steps, middles)] * steps - sizes).square_()  # [positions, candidates]
    position = (_ratio(weights, extreme[:, None]) * _POSITIONS).round_().to(torch.int32) + _POSITIONS
    score = torch.nn.functional.embedding_bag(position, errors, mode="sum", per_sample_weights=h.contiguous())
    scale = _half(extreme * steps[score.argmin(1)])
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for _ in range(_ROUNDS):
        values = table[torch.bucketize(_ratio(weights, scale[:, None]), middles)]
        error = _error(weights, h, values * scale[:, None], 1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
        scale = _half(_quotient((h * values * weights).sum(1), (h * values.square()).sum(1), scale))
    return best.half()


class _Best:
    """The best block scales and multipliers so far."""

    def __init__(self, blocks: int, shape: torch.Size, device: torch.device) -> None:
        self.scale = torch.zeros(blocks, device=device)
        self.multiplier = torch.zeros(shape, device=device)
        self._error = torch.full((blocks,), torch.inf, device=device)

    def offer(self, error: Tensor, scale: Tensor, multiplier: Tensor) -> None:
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.multiplier = torch.where(better[:, None], multiplier, self.multiplier)


class _BestPair:
    """The best block scales, minima and multipliers of both so far."""

    def __init__(self, blocks: int, shape: torch.Size, device: torch.device) -> None:
        self.scale, self.minimum = torch.zeros(2, blocks, device=device)
        self.m, self.k = torch.zeros(2, *shape, device=device)
        self._error = torch.full((blocks,), torch.inf, device=device)

    def offer(self, error: Tensor, scale: Tensor, minimum: Tensor, m: Tensor, k: Tensor) -> None:
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale, self.minimum = torch.where(better, scale, self.scale), torch.where(better, minimum, self.minimum)
        self.m, self.k = torch.where(better[:, None], m, self.m), torch.where(better[:, None], k, self.k)


def _best_single(weights: Tensor, h: Tensor, half: int) -> Tensor:
    """The best scale of every sub-block by itself, of either sign: the levels reach further below zero."""
    extreme = weights.gather(2, weights.abs().argmax(2, keepdim=True))[..., 0]
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for end in (-half, half - 1):
        for factor in _FACTORS:
            step = (extreme / end * factor)[..., None]
            levels = _levels(weights, step, half)
            fitted = _quotient((h * levels * weights).sum(2), (h * levels.square()).sum(2), step[..., 0])
            error = _error(weights, h, levels * fitted[..., None], 2)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, fitted, best)
    return best


def _best_single_minimum(weights: Tensor, h: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best scale and what is subtracted, of every sub-block by itself."""
    low, high = weights.amin(2).clamp(max=0), weights.amax(2)
    best = torch.zeros_like(low), -low
    least = torch.full_like(low, torch.inf)
    weight = h.expand_as(weights)
    for factor in _FACTORS:
        step, offset = (high - low) * factor / top, -low
        for _ in range(2):
            codes = ((weights + offset[..., None]) / step[..., None].clamp(min=_TINY)).round_().clamp_(0, top)
            error = _error(weights, h, codes * step[..., None] - offset[..., None], 2)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, step, best[0]), torch.where(better, offset, best[1])
            total, mean_c, mean_w = weight.sum(2), (weight * codes).sum(2), (weight * weights).sum(2)
            slope = _quotient(
                total * (weight * codes * weights).sum(2) - mean_c * mean_w,
                total * (weight * codes.square()).sum(2) - mean_c.square(),
                step,
            )
            step = slope.clamp(min=0)
            offset = ((step * mean_c - mean_w) / total.clamp(min=_TINY)).clamp(min=0)
    return best


def _two_numbers(
    weights: Tensor, h: Tensor, a: Tensor, b: Tensor, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """The two numbers with the least error of ``scale * a + minimum * b``; those given where they are not positive."""
    weight = h.expand_as(weights)
    aa, ab, bb = ((weight * x * y).sum((1, 2)) for x, y in ((a, a), (a, b), (b, b)))
    aw, bw = (weight * a * weights).sum((1, 2)), (weight * b * weights).sum((1, 2))
    determinant = aa * bb - ab.square()
    first, second = (aw * bb - bw * ab) / determinant, (aa * bw - ab * aw) / determinant
    good = (determinant > 1e-12 * aa * bb) & (first > 0) & (second > 0)
    alone = _quotient(aw, aa, scale)
    return _half(torch.where(good, first, torch.where(minimum > 0, scale, alone).abs())), _half(
        torch.where(good, second, minimum)
    )


def _near_multiplier(weights: Tensor, h: Tensor, scale: Tensor, single: Tensor, half: int, lowest: int) -> Tensor:
    """The best of three neighbouring multipliers of every sub-block, float32 ``[n, subs]``."""
    middle = _ratio(single, scale[:, None]).round_()
    best, least = torch.zeros_like(single), torch.full_like(single, torch.inf)
    for offset in (0, -1, 1):
        multiplier = (middle + offset).clamp_(lowest, -lowest - 1)
        step = (scale[:, None] * multiplier)[..., None]
        error = _error(weights, h, _levels(weights, step, half) * step, 2)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, multiplier, best)
    return best


def _levels(weights: Tensor, step: Tensor, half: int) -> Tensor:
    return _ratio(weights, step).round_().clamp_(-half, half - 1)


def _ratio(weights: Tensor, step: Tensor) -> Tensor:
    """``weights / step``, 0 where the step is."""
    while step.ndim < weights.ndim:
        step = step[..., None]
    return torch.where(step == 0, 0.0, weights / torch.where(step == 0, 1.0, step))


def _quotient(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=_TINY), otherwise)


def _error(weights: Tensor, h: Tensor, values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return (values - weights).square_().mul_(h).sum(dims)


def _half(scale: Tensor) -> Tensor:
    """The scale as float16 stores it.

    Raises:
        NumericalError: it is not finite, or overflows.
    """
    stored = scale.to(torch.float16).float()
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(
            "the scale of a block is not a finite float16: the weight, or the target it was corrected to, holds NaN or "
            "Inf or is too large; more damping may help."
        )
    return stored

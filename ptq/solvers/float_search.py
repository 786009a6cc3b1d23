"""LLM-FP4's search (arXiv 2310.16836): number format and clip ratio of weights and of activations, on output errors.

A weight ``W [out, n]`` has one format and a scale per output channel, an activation tensor ``X [t, n]`` one format and
a static scale, which per-channel shifts divide by powers of two (`ptq.activation_formats.static_input`). Both are
chosen to make

    ||X^ W^^T - X W^T||^2        X^ = Q(X), W^ = Q(W)

small, in turn: weights for the current X^, then activations for the current W^. Scales are ``ratio * max / maximum``
with the ratio searched: multiples of an exponent bias, as in the paper's code, would clip or widen the range depending
on the sign of the bias (and do nothing where it is 0).

What costs is rounding and multiplying candidates, so few are: of a row's 48 ratios a table of errors names the best
(`ptq.solvers.float_screen`), of which three are measured; formats, and the inputs' quantizer, are searched on some of
the rows and tokens first. What is measured is in `ptq.solvers.float_errors`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from calib.precision import product
from ptq.activation_formats.static_input import StaticInput, fit_static_input
from ptq.grids.floating_point import FloatFormat
from ptq.grids.scale_search import stored_scale
from ptq.solvers.float_errors import Sketch, TokenChoice, WeightErrors
from ptq.solvers.float_screen import screen

__all__ = [
    "NO_CLIP",
    "RATIOS",
    "TOKENS",
    "FloatInput",
    "FloatWeight",
    "InputErrors",
    "SearchResult",
    "search_float",
    "search_input",
    "search_weight",
    "weight_at",
]

RATIOS = tuple(2.0 ** ((step - 38) / 19) for step in range(48))
"""Clip ratios that are tried, 0.25 to 1.39 in equal steps of the logarithm: whole shifts leave channels with up to 1.41
times less range than they have, which a larger scale makes good."""
NO_CLIP = 38
"""The index of ratio 1."""
TOKENS = 512
"""How many tokens stand for the sample."""
_MEASURED = 3  # ratios of a row, the best by the table, whose errors are measured
_SAMPLED_ROWS = 96  # to twice as many; on them formats are compared, and inputs searched in all rounds but the last
_CLOSE = 1.05  # times the best format's error, up to which another is searched to the end
_FEW_TOKENS = 160  # of the first round
_STRIDE = 4  # every so many ratios are tried first, then those between them around the best
_FAR = 1.1  # the same after the first round
_HOPELESS = 1.3  # the same of inputs' ratios before those between them were tried
_VALLEYS = 4  # ratios of inputs that later rounds may begin from
_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 25  # rounded numbers at once: bounds the temporaries


@dataclasses.dataclass(frozen=True)
class FloatWeight:
    """A weight's format and scales.

    Args:
        number: the format of all codes.
        scale: float32 ``[out, 1]``, as it will be stored.
        choice: int64 ``[out]``, the index of every row's ratio in `RATIOS`.
        error: float32 ``[out]``, the rows' output errors; empty if unknown.
    """

    number: FloatFormat
    scale: Tensor
    choice: Tensor
    error: Tensor

    def round(self, weight: Tensor) -> Tensor:
        """Quantized values of ``weight`` ``[out, n]``, float32."""
        return self.number.round(weight / self.scale) * self.scale


@dataclasses.dataclass(frozen=True)
class FloatInput:
    """An activation quantizer, the index of its ratio in `RATIOS`, and the squared error of the outputs it was measured
    on."""

    quantizer: StaticInput
    choice: int
    error: float


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What `search_float` chose.

    Args:
        weight: format and scales.
        inputs: the activation quantizer; ``None`` where inputs stay as they are.
        rounds: how many were made: fewer than asked for if one left the inputs as they were.
    """

    weight: FloatWeight
    inputs: FloatInput | None
    rounds: int


def search_float(
    weight: Tensor,
    samples: Tensor,
    absmax: Tensor,
    weight_formats: Sequence[FloatFormat],
    input_formats: Sequence[FloatFormat],
    dtype: torch.dtype,
    *,
    shift: bool = True,
    rounds: int = 3,
) -> SearchResult:
    """Search weights and activations in turn, beginning with the first format of each and no clipping.

    The inputs' quantizer is found for some rows of the weight and measured for all of them at the end: the first round
    tries its formats and ratios on few tokens, the others follow it to its neighbours. Only the last round searches
    all rows.

    Args:
        weight: float32 ``[out, n]``.
        samples: tokens ``[t, n]``, in random order.
        absmax: float32 ``[n]``, the largest magnitude of every channel over all tokens.
        weight_formats: which formats weights may have.
        input_formats: which formats inputs may have.
        dtype: in which the weight's scales are stored.
        shift: whether input channels have shifts.
        rounds: how often both are searched; 0 keeps the beginning (min-max).
    """
    inputs = [FloatInput(fit_static_input(absmax, input_formats[0], RATIOS[NO_CLIP], shift=shift), NO_CLIP, 0.0)]
    if not rounds:
        return SearchResult(weight_at(weight, weight_formats[0], NO_CLIP, dtype), inputs[0], 0)

    def in_turn(own: Tensor, tokens: TokenChoice, *, coarse: bool) -> tuple[list[FloatWeight], list[FloatInput]]:
        wanted = tokens.outputs(own)
        found = search_weight(own, tokens.errors(inputs[0].quantizer, wanted), weight_formats, dtype)
        measure = InputErrors(tokens, wanted, absmax, found[0].round(own), shift=shift)
        return found, (_coarse_inputs(measure, input_formats) if coarse else search_input(measure, inputs))

    some, tokens = _some_rows(weight), TokenChoice.of(samples, TOKENS)
    rough, inputs = in_turn(some, TokenChoice.of(samples, _FEW_TOKENS), coarse=True)
    limit = _FAR * _sum(rough[0].error)
    weight_formats = [one.number for one in rough if _sum(one.error) <= limit]
    done, settled = 1, False
    while done < rounds - 1 and not settled:
        before = inputs[0]
        _, inputs = in_turn(some, tokens, coarse=False)
        settled = inputs[0].choice == before.choice and inputs[0].quantizer.number == before.quantizer.number
        done += 1
    found, inputs = in_turn(weight, tokens, coarse=False)
    return SearchResult(found[0], inputs[0], min(done + 1, rounds))


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: max(1, len(weight) // _SAMPLED_ROWS)]


def weight_at(weight: Tensor, number: FloatFormat, choice: Tensor | int, dtype: torch.dtype) -> FloatWeight:
    """The format with every row's range times a ratio of `RATIOS`, by index (an int: of all rows)."""
    if isinstance(choice, int):
        choice = torch.full((len(weight),), choice, device=weight.device)
    return FloatWeight(number, _scales(weight, number, choice[:, None], dtype), choice, torch.empty(0))


def _scales(weight: Tensor, number: FloatFormat, choice: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored, float32 ``[out, c]``, of the ratios ``choice [out, c]``."""
    unit = weight.abs().amax(1, keepdim=True) / number.maximum
    return stored_scale(unit * _ratios(weight.device)[choice], dtype)


@functools.lru_cache(maxsize=8)
def _ratios(device: torch.device) -> Tensor:
    return torch.tensor(RATIOS, device=device)


def search_weight(
    weight: Tensor,
    errors: WeightErrors,
    formats: Sequence[FloatFormat],
    dtype: torch.dtype,
) -> list[FloatWeight]:
    """The best clip ratio of every row for each format that is not far behind, the best format first.

    Args:
        weight: float32 ``[out, n]``.
        errors: what to make small.
        formats: which are tried; more than one are compared on some of the rows first.
        dtype: in which scales are stored.
    """

    def search(number: FloatFormat, rows: slice) -> FloatWeight:
        return _search_rows(weight[rows], errors.of_rows(rows), sketch, number, dtype)

    sketch = errors.sketch()
    every = slice(None)
    few = slice(0, None, max(1, len(weight) // _SAMPLED_ROWS))
    if len(formats) > 1 and len(weight) >= 2 * _SAMPLED_ROWS:
        sampled = {number: _sum(search(number, few).error) for number in formats}
        limit = _CLOSE * min(sampled.values())
        formats = [number for number in formats if sampled[number] <= limit]
    found = [search(number, every) for number in formats]
    return found if len(found) == 1 else sorted(found, key=lambda one: _sum(one.error))


def _sum(error: Tensor) -> float:
    return float(error.sum(dtype=torch.float64))


def _search_rows(
    weight: Tensor, errors: WeightErrors, sketch: Sketch, number: FloatFormat, dtype: torch.dtype
) -> FloatWeight:
    """The best ratio of every row in one format."""
    estimates = screen(weight, sketch, number, RATIOS)
    candidates = estimates.topk(_MEASURED, dim=1, largest=False).indices
    least = estimates.gather(1, candidates[:, :1])
    plain = estimates[:, NO_CLIP : NO_CLIP + 1] <= least  # also where all are equal: nothing is clipped without a gain
    candidates[:, :1] = torch.where(plain, NO_CLIP, candidates[:, :1])
    scales = _scales(weight, number, candidates, dtype)
    limit = _CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, limit // (_MEASURED * weight.shape[1]))
    parts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        scale = scales[rows, :, None]
        rounded = number.round(weight[rows, None] / scale).mul_(scale)
        parts.append(errors.of_rows(rows).errors(weight[rows], rounded))
    return _best(number, scales, candidates, torch.cat(parts))


def _best(number: FloatFormat, scales: Tensor, candidates: Tensor, errors: Tensor) -> FloatWeight:
    """Row by row the candidate with the smallest error, the first of equal ones."""
    scale, choice, error = scales[:, 0], candidates[:, 0], errors[:, 0]
    for index in range(1, errors.shape[1]):
        wins = errors[:, index] < error
        scale = torch.where(wins, scales[:, index], scale)
        choice = torch.where(wins, candidates[:, index], choice)
        error = torch.where(wins, errors[:, index], error)
    return FloatWeight(number, scale[:, None], choice, error)


def _coarse_inputs(measure: InputErrors, formats: Sequence[FloatFormat]) -> list[FloatInput]:
    """The best ratios of the formats, the best first: those better than their neighbours, and not far behind.

    With shifts the error has several such valleys: where the ratio doubles, shifts have grown by one.
    """
    found: list[FloatInput] = []
    for number in formats:
        curve = measure.at(number, range(NO_CLIP % _STRIDE, len(RATIOS), _STRIDE))
        padded = [math.inf, *(one.error for one in curve), math.inf]
        around = zip(padded, padded[1:], padded[2:], curve, strict=False)
        found += [one for before, error, after, one in around if error < before and error <= after]
    found = _leading(found, _HOPELESS)
    for offset in (_STRIDE // 2, _STRIDE // 4):
        found = [measure.near(one, offset) for one in found]
    return _leading(found, _FAR)[:_VALLEYS]


def search_input(measure: InputErrors, last: Sequence[FloatInput]) -> list[FloatInput]:
    """The ratios near the last ones for the formats that are left, the best format first; others are dropped."""
    return _leading((measure.descend(one) for one in last), _CLOSE)


def _leading(found: Iterable[FloatInput], limit: float) -> list[FloatInput]:
    """Those whose error is at most so many times the least one, in its order."""
    ranked = sorted(found, key=lambda one: one.error)
    return [one for one in ranked if one.error <= limit * ranked[0].error]


class InputErrors:
    """``||X^ W^^T - X W^T||^2`` of activation quantizers.

    Args:
        tokens: X.
        wanted: ``X W^T``, weighted.
        absmax: the largest magnitudes of X's channels.
        rounded: W^.
        shift: whether channels have shifts.
    """

    def __init__(self, tokens: TokenChoice, wanted: Tensor, absmax: Tensor, rounded: Tensor, *, shift: bool) -> None:
        self._tokens, self._wanted, self._absmax, self._rounded = tokens, wanted, absmax, rounded
        self._fit: Callable[[FloatFormat, int], StaticInput] = lambda number, choice: fit_static_input(
            absmax, number, RATIOS[choice], shift=shift
        )
        limit = _CHUNK if absmax.device.type == "cpu" else _DEVICE_CHUNK
        self._batch = max(1, limit // max(1, len(tokens.tokens) * max(rounded.shape)))

    def __call__(self, number: FloatFormat, choices: Sequence[int]) -> list[float]:
        """The errors at some ratios, several of them in one product where they fit."""
        found: list[float] = []
        for start in range(0, len(choices), self._batch):
            quantizers = [self._fit(number, choice) for choice in choices[start : start + self._batch]]
            found += self._measure(number, torch.stack([one.channel_scale() for one in quantizers])[:, None])
        return found

    def _measure(self, number: FloatFormat, scale: Tensor) -> list[float]:
        seen = number.round(self._tokens.tokens / scale).mul_(scale).mul_(self._tokens.weight)
        output = product(seen.flatten(0, 1), self._rounded.T).view(len(scale), *self._wanted.shape)
        per_token = output.sub_(self._wanted).square_().sum(2)
        result: list[float] = per_token.sum(1, dtype=torch.float64).tolist()
        return result

    def at(self, number: FloatFormat, choices: Sequence[int]) -> list[FloatInput]:
        """What is measured at some ratios."""
        errors = self(number, choices)
        return [FloatInput(self._fit(number, i), i, error) for i, error in zip(choices, errors, strict=True)]

    def best(self, number: FloatFormat, choices: Sequence[int]) -> FloatInput:
        """The best of some ratios, the first of equal ones."""
        return min(self.at(number, choices), key=lambda one: one.error)

    def near(self, one: FloatInput, offset: int) -> FloatInput:
        """The best of a measured ratio and those on both sides of it."""
        top = len(RATIOS) - 1
        others = [choice for choice in (one.choice - offset, one.choice + offset) if 0 <= choice <= top]
        other = self.best(one.quantizer.number, others)
        return other if other.error < one.error else one

    def descend(self, start: FloatInput) -> FloatInput:
        """From a ratio on to better neighbours, until there is none."""
        number, top = start.quantizer.number, len(RATIOS) - 1
        near = [choice for choice in (start.choice, start.choice - 1, start.choice + 1) if 0 <= choice <= top]
        found = self.best(number, near)
        step = found.choice - start.choice
        while step and 0 <= found.choice + step <= top:
            further = self.best(number, [found.choice + step])
            if further.error >= found.error:
                break
            found = further
        return found

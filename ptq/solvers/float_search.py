"""LLM-FP4's search (arXiv 2310.16836): number format and clip ratio of weights and of activations, on output errors.

A weight ``W [out, n]`` has one format and a scale per output channel, an activation tensor ``X [t, n]`` one format and
a static scale, which per-channel shifts divide by powers of two (`ptq.activation_formats.static_input`). Both are
chosen to make

    ||X^ W^^T - X W^T||^2        X^ = Q(X), W^ = Q(W)

small, in turn: weights for the current X^, then activations for the current W^. Scales are ``ratio * max / maximum``
with the ratio searched: multiples of an exponent bias, as in the paper's code, would clip or widen the range depending
on the sign of the bias (and do nothing where it is 0).

With ``E = W^ - W`` and ``D = X^ - X`` the output's error is ``X^ E^T + D W^T = D W^^T + X E^T``. So the weights' search
needs the tokens only as Gram matrices,

    error_k = e_k G e_k^T + 2 e_k F w_k^T + ||D w_k||^2        G = X^^T X^,  F = X^^T D,

``out n^2`` per candidate where the product with all tokens would take ``t n out``; and the activations' search needs
the weights, where there are more outputs than inputs, only as ``W^^T W^``. Neither is a difference of large numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calib.precision import product
from ptq.activation_formats.static_input import StaticInput, fit_static_input, power_of_two
from ptq.grids.floating_point import FloatFormat
from ptq.grids.scale_search import stored_scale

__all__ = [
    "NO_CLIP",
    "RATIOS",
    "FloatInput",
    "FloatWeight",
    "InputMoments",
    "SearchResult",
    "output_error",
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
_STRIDE = 4  # every so many ratios are tried first, then those between them around the best
_NEAR = 2  # ratios on both sides of the last choice that a later round tries
_HOPELESS = 1.3  # times the best format's error, from which on later rounds leave a format of inputs out
_FEW_TOKENS = 512  # of the coarse sweep over the inputs' ratios
_ROW_CHUNK, _DEVICE_ROW_CHUNK = 1 << 20, 1 << 26  # weights searched at once: bounds the temporaries
_TOKEN_CHUNK = 1 << 24  # inputs, or outputs, in one temporary of the activations' search


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """What the weights' search needs of the inputs.

    Args:
        gram: ``X^^T X^`` float32 ``[n, n]``.
        drift: ``X^^T (X^ - X)`` float32 ``[n, n]``; ``None`` where inputs are not quantized.
    """

    gram: Tensor
    drift: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, quantizer: StaticInput | None) -> InputMoments:
        """Of sampled inputs ``[t, n]``, chunk after chunk of tokens."""
        width = inputs.shape[1]
        gram = torch.zeros(width, width, device=inputs.device)
        drift = None if quantizer is None else torch.zeros_like(gram)
        for chunk in _chunks(inputs, width):
            exact = chunk.float()
            seen = exact if quantizer is None else quantizer(exact)
            gram += product(seen.T, seen)
            if drift is not None:
                drift += product(seen.T, seen - exact)
        return cls(gram, drift)

    def folded(self, quantizer: StaticInput) -> InputMoments:
        """The same of inputs multiplied by the powers of two of the quantizer's shifts."""
        if quantizer.shift is None:
            return self
        power = power_of_two(quantizer.shift.int())
        square = power[:, None] * power
        return InputMoments(self.gram * square, None if self.drift is None else self.drift * square)


@dataclasses.dataclass(frozen=True)
class FloatWeight:
    """A weight's format and scales.

    Args:
        number: the format of all codes.
        scale: float32 ``[out, 1]``, as it will be stored.
        choice: int64 ``[out]``, the index of every row's ratio in `RATIOS`.
        error: float32 ``[out]``, the rows' output errors without the part that no weight changes; empty if unknown.
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
    """An activation quantizer, the index of its ratio in `RATIOS`, and the squared error of the sampled outputs."""

    quantizer: StaticInput
    choice: int
    error: float


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What `search_float` chose.

    Args:
        weight: format and scales.
        inputs: the activation quantizer; ``None`` where inputs stay as they are.
        rounds: how many were made: fewer than asked for if one changed nothing.
    """

    weight: FloatWeight
    inputs: FloatInput | None
    rounds: int


def search_float(
    weight: Tensor,
    moments: InputMoments | None,
    samples: Tensor | None,
    absmax: Tensor | None,
    weight_formats: Sequence[FloatFormat],
    input_formats: Sequence[FloatFormat],
    dtype: torch.dtype,
    *,
    shift: bool = True,
    rounds: int = 3,
) -> SearchResult:
    """Search weights and activations in turn, beginning with the first format of each and no clipping.

    Args:
        weight: float32 ``[out, n]``.
        moments: of the inputs where they stay as they are; otherwise they are taken from ``samples``.
        samples: tokens ``[t, n]`` for quantized inputs.
        absmax: float32 ``[n]``, the largest magnitude of every channel over all tokens, likewise.
        weight_formats: which formats weights may have.
        input_formats: which formats inputs may have; empty leaves them as they are.
        dtype: in which the weight's scales are stored.
        shift: whether input channels have shifts.
        rounds: how often both are searched; 0 keeps the beginning (min-max).
    """
    weights = [weight_at(weight, weight_formats[0], NO_CLIP, dtype)]
    if not input_formats:
        if rounds:
            assert moments is not None
            weights = search_weight(weight, moments, weight_formats, dtype)
        return SearchResult(weights[0], None, min(rounds, 1))
    assert samples is not None
    assert absmax is not None
    first = fit_static_input(absmax, input_formats[0], RATIOS[NO_CLIP], shift=shift)
    inputs, done = [FloatInput(first, NO_CLIP, 0.0)], 0
    while done < rounds:
        before = weights[0], inputs[0]
        current = InputMoments.of(samples, inputs[0].quantizer)
        weights = search_weight(weight, current, weight_formats, dtype, weights if done else ())
        rounded = weights[0].round(weight)
        inputs = search_input(samples, absmax, weight, rounded, input_formats, shift=shift, last=inputs if done else ())
        done += 1
        if _unchanged(before, (weights[0], inputs[0])):
            break
    return SearchResult(weights[0], inputs[0], done)


def _unchanged(before: tuple[FloatWeight, FloatInput], after: tuple[FloatWeight, FloatInput]) -> bool:
    same = before[0].number == after[0].number and torch.equal(before[0].choice, after[0].choice)
    return same and before[1].quantizer.number == after[1].quantizer.number and before[1].choice == after[1].choice


def weight_at(weight: Tensor, number: FloatFormat, choice: Tensor | int, dtype: torch.dtype) -> FloatWeight:
    """The format with every row's range times a ratio of `RATIOS`, by index (an int: of all rows)."""
    if isinstance(choice, int):
        choice = torch.full((len(weight),), choice, device=weight.device)
    ratios = torch.tensor(RATIOS, device=weight.device)[choice]
    unit = weight.abs().amax(1) / number.maximum
    return FloatWeight(number, stored_scale(unit * ratios, dtype)[:, None], choice, torch.empty(0))


def search_weight(
    weight: Tensor,
    moments: InputMoments,
    formats: Sequence[FloatFormat],
    dtype: torch.dtype,
    last: Sequence[FloatWeight] = (),
) -> list[FloatWeight]:
    """The best clip ratio of every row for each format, the best format first.

    Args:
        weight: float32 ``[out, n]``.
        moments: of the inputs.
        formats: which are tried.
        dtype: in which scales are stored.
        last: what the previous round gave; only ratios near it are tried then, and it is never left for a worse one.
    """
    before = {one.number: one.choice for one in last}
    pull = None if moments.drift is None else product(weight, moments.drift.T)  # rows F w_k

    def score(rows: slice, candidate: FloatWeight) -> Tensor:
        error = candidate.round(weight[rows]).sub_(weight[rows])
        slope = product(error, moments.gram)
        if pull is not None:
            slope.add_(pull[rows], alpha=2)
        return slope.mul_(error).sum(1)

    def search_rows(rows: slice, number: FloatFormat) -> FloatWeight:
        def attempt(choice: Tensor) -> FloatWeight:
            found = weight_at(weight[rows], number, choice, dtype)
            return dataclasses.replace(found, error=score(rows, found))

        start = before.get(number)
        return _search_ratio(attempt, weight[rows], None if start is None else start[rows])

    limit = _ROW_CHUNK if weight.device.type == "cpu" else _DEVICE_ROW_CHUNK
    step = max(1, limit // weight.shape[1])
    chunks = [slice(start, start + step) for start in range(0, len(weight), step)]
    found = [_joined([search_rows(rows, number) for rows in chunks]) for number in formats]
    return sorted(found, key=lambda one: float(one.error.sum(dtype=torch.float64)))


def _search_ratio(attempt: Callable[[Tensor], FloatWeight], rows: Tensor, start: Tensor | None) -> FloatWeight:
    """The best ratio of every row: first a coarse sweep, then its neighbours; from ``start`` only these."""
    top = len(RATIOS) - 1
    if start is None:
        coarse = [attempt(torch.full((len(rows),), i, device=rows.device)) for i in (NO_CLIP, *range(0, top, _STRIDE))]
        best = coarse[0]
        for other in coarse[1:]:
            best = _better(best, other)
        start, reach = best.choice, _STRIDE - 1
    else:
        best, reach = attempt(start), _NEAR
    for offset in (*range(-reach, 0), *range(1, reach + 1)):
        best = _better(best, attempt((start + offset).clamp(0, top)))
    return best


def _better(one: FloatWeight, other: FloatWeight) -> FloatWeight:
    """Row by row the one with the smaller error, ``one`` where they are equal."""
    wins = other.error < one.error
    return FloatWeight(
        one.number,
        torch.where(wins[:, None], other.scale, one.scale),
        torch.where(wins, other.choice, one.choice),
        torch.where(wins, other.error, one.error),
    )


def _joined(parts: Sequence[FloatWeight]) -> FloatWeight:
    if len(parts) == 1:
        return parts[0]
    scale, choice, error = (torch.cat([getattr(p, name) for p in parts]) for name in ("scale", "choice", "error"))
    return FloatWeight(parts[0].number, scale, choice, error)


def search_input(
    inputs: Tensor,
    absmax: Tensor,
    weight: Tensor,
    quantized: Tensor,
    formats: Sequence[FloatFormat],
    *,
    shift: bool = True,
    last: Sequence[FloatInput] = (),
) -> list[FloatInput]:
    """The best clip ratio of the activations for each format, the best format first.

    Args:
        inputs: sampled tokens ``[t, n]``.
        absmax: float32 ``[n]``, the largest magnitude of every channel over all tokens.
        weight: float32 ``[out, n]``.
        quantized: its quantized values.
        formats: which are tried.
        shift: whether channels have shifts.
        last: as in `search_weight`; formats whose error was much larger than the best one's are not tried again.
    """
    limit = _HOPELESS * min((one.error for one in last), default=0.0)
    before = {one.quantizer.number: one.choice for one in last if one.error <= limit}
    formats = tuple(before) or tuple(formats)
    loss = _input_loss(inputs, weight, quantized)
    rough = loss if last or len(inputs) <= _FEW_TOKENS else _input_loss(inputs[:_FEW_TOKENS], weight, quantized)

    def search(number: FloatFormat) -> FloatInput:
        @functools.cache
        def attempt(choice: int) -> float:
            return loss(fit_static_input(absmax, number, RATIOS[choice], shift=shift))

        def roughly(choice: int) -> float:
            return rough(fit_static_input(absmax, number, RATIOS[choice], shift=shift))

        top, start, reach = len(RATIOS) - 1, before.get(number), _NEAR
        if start is None:
            coarse = (NO_CLIP, *range(0, top, _STRIDE))
            start, reach = min(coarse, key=attempt if rough is loss else roughly), _STRIDE - 1
        near = range(max(0, start - reach), min(top, start + reach) + 1)
        choice = min(near, key=lambda one: (attempt(one), one != start))
        return FloatInput(fit_static_input(absmax, number, RATIOS[choice], shift=shift), choice, attempt(choice))

    return sorted(map(search, formats), key=lambda one: one.error)


def _chunks(inputs: Tensor, width: int) -> list[Tensor]:
    """``inputs`` ``[t, n]`` in parts of so many tokens that rows of ``width`` numbers stay bounded."""
    step = max(1, _TOKEN_CHUNK // width)
    return [inputs[start : start + step] for start in range(0, len(inputs), step)]


def _total(values: Tensor) -> float:
    """The sum of a matrix: of rows in float32, of their sums in float64."""
    return float(values.sum(1).sum(dtype=torch.float64))


def _input_loss(inputs: Tensor, weight: Tensor, quantized: Tensor) -> Callable[[StaticInput], float]:
    """``||D W^^T + X E^T||^2`` as a function of the quantizer; what does not depend on it is computed once."""
    out, width = weight.shape
    by_gram = width < out
    gram = product(quantized.T, quantized) if by_gram else quantized.T
    fixed, constant = [], 0.0
    chunks = _chunks(inputs, max(out, width))
    for chunk in chunks:
        residual = product(chunk.float(), (quantized - weight).T)  # X E^T
        constant += _total(residual.square())
        fixed.append(product(residual, quantized) if by_gram else residual)

    def loss(quantizer: StaticInput) -> float:
        total = constant
        for chunk, own in zip(chunks, fixed, strict=True):
            exact = chunk.float()
            difference = quantizer(exact).sub_(exact)
            moved = product(difference, gram)
            if by_gram:  # <D A, D> + 2 <D, R W^>
                total += _total(moved.add_(own, alpha=2).mul_(difference))
            else:  # ||D W^^T||^2 + 2 <D W^^T, R>
                total += _total(torch.add(moved, own, alpha=2).mul_(moved))
        return total

    return loss


def output_error(inputs: Tensor, quantizer: StaticInput | None, weight: Tensor, quantized: Tensor) -> float:
    """``||X^ W^^T - X W^T||^2 / ||X W^T||^2`` of sampled inputs ``[t, n]``; 0 where the output is."""
    error, energy = 0.0, 0.0
    for chunk in _chunks(inputs, max(weight.shape)):
        exact = chunk.float()
        wanted = product(exact, weight.T)
        found = product(exact if quantizer is None else quantizer(exact), quantized.T)
        error += _total((found - wanted).square_())
        energy += _total(wanted.square_())
    return error / energy if energy else 0.0

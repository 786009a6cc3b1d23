"""Statistics of one input group, streamed batch by batch.

With tokens as rows, ``X [t, n]`` the group's inputs in the full-precision model and ``X~`` those in the model
quantized so far, on the same tokens:

    H = X~^T X~ [n, n]        D = (X - X~)^T X~ [n, n]        energy_i = ||W_i (X - X~)^T||^2   a row of W

All are sums over tokens (no normalisation: nothing that uses them depends on their scale). A method names what it
needs as `Stat`s; nothing else is gathered. Inputs in bfloat16 are multiplied exactly (`calib.precision`); their
difference is rounded to bfloat16 once, which is exact where X and X~ are within a factor of two of each other and
otherwise an unbiased relative error of 2^-9 on single entries.

The float32 products of single batches are added up in float64 and rounded to float32 at the end. So it does not matter
(but for ties of that rounding) in which order batches come or which process had them: `StatisticsAccumulator.reduce_`.
Of symmetric products only the upper triangle is computed and kept, by blocks.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from calib.errors import ModelError, NumericalError
from calib.input_samples import AllGather, ChannelRanges, TokenSample
from calib.precision import Operand, gram_bounds, product, share_not_finite
from calib.token_bounds import bound_tokens

__all__ = ["GroupStatistics", "LinearStatistics", "Moments", "Stat", "StatisticsAccumulator"]

T = TypeVar("T")
_NO_VARIANCE = 1e-13  # of the mean square: what rounding of sums in float64 can leave


class Stat(enum.Enum):
    """What can be gathered on the inputs of a linear."""

    HESSIAN = "hessian"
    MISMATCH = "mismatch"
    MISMATCH_ENERGY = "mismatch energy"
    FOLDS = "hessian and mismatch on two halves of the sequences"
    EFFECTIVE_TOKENS = "number of tokens that count as independent"
    BOUNDED = "a bound on what a token with huge inputs adds to all sums"
    RANGES = "smallest and largest input of every channel"
    SAMPLES = "a sample of the inputs' tokens"


TWO_STREAMS = frozenset({Stat.MISMATCH, Stat.MISMATCH_ENERGY, Stat.FOLDS, Stat.EFFECTIVE_TOKENS})


@dataclasses.dataclass(frozen=True)
class Moments:
    """``H`` and ``D`` of some tokens, float32 ``[n, n]`` each."""

    hessian: Tensor
    mismatch: Tensor | None


@dataclasses.dataclass
class GroupStatistics:
    """What was gathered on one input group, and what methods derived from it for all linears of the group.

    Args:
        tokens: number of tokens seen; ``sequences`` likewise.
        moments: over all tokens.
        folds: the same on the even and the odd sequences (`Stat.FOLDS`), else empty.
        energy: by linear, ``[out]`` the mismatch energy of every output row.
        effective_tokens: by linear (`Stat.EFFECTIVE_TOKENS`).
        ranges: float32 ``[2, n]``, minimum and maximum of every channel of X~ (`Stat.RANGES`).
        samples: some tokens of X~ ``[t, n]`` (`Stat.SAMPLES`).
    """

    tokens: int
    sequences: int
    moments: Moments | None
    folds: tuple[Moments, ...] = ()
    energy: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    effective_tokens: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ranges: Tensor | None = None
    samples: Tensor | None = None
    _memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` once a group: linears that share an input share their factorization."""
        if key not in self._memo:
            self._memo[key] = make()
        result: T = self._memo[key]
        return result

    def of(self, linear: str) -> LinearStatistics:
        return LinearStatistics(linear, self)


@dataclasses.dataclass(frozen=True)
class LinearStatistics:
    """The statistics as one linear sees them: what a method gets."""

    linear: str
    group: GroupStatistics

    @property
    def hessian(self) -> Tensor:
        """``H`` float32 ``[n, n]``."""
        return self._moments.hessian

    @property
    def mismatch(self) -> Tensor:
        """``D = (X - X~)^T X~`` float32 ``[n, n]``, rows are channels of the difference."""
        return _there(self._moments.mismatch, Stat.MISMATCH)

    @property
    def has_mismatch(self) -> bool:
        return self.group.moments is not None and self.group.moments.mismatch is not None

    @property
    def energy(self) -> Tensor:
        """``||W_i (X - X~)^T||^2`` float32 ``[out]``."""
        return _there(self.group.energy.get(self.linear), Stat.MISMATCH_ENERGY)

    @property
    def effective_tokens(self) -> float:
        return _there(self.group.effective_tokens.get(self.linear), Stat.EFFECTIVE_TOKENS)

    @property
    def ranges(self) -> Tensor:
        """Minimum and maximum of every input channel, float32 ``[2, n]``."""
        return _there(self.group.ranges, Stat.RANGES)

    @property
    def samples(self) -> Tensor:
        """Some tokens of the inputs ``[t, n]``, in the dtype of the passes (`calib.input_samples.TokenSample`)."""
        return _there(self.group.samples, Stat.SAMPLES)

    @property
    def _moments(self) -> Moments:
        return _there(self.group.moments, Stat.HESSIAN)


def _there(value: T | None, stat: Stat) -> T:
    if value is None:
        raise ValueError(f"the method uses the statistic {stat.value!r} without naming it in its needs")
    return value


class _Gram:
    """``sum X^T X`` over batches: the upper triangle in float64, one block of rows after another."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._bounds, self._width = gram_bounds(width), width
        self.rows = [
            torch.zeros(stop - start, width - start, device=device, dtype=torch.float64) for start, stop in self._bounds
        ]

    def add(self, inputs: Operand) -> int:
        """Add a batch ``[t, n]``; returns the floating-point operations."""
        for (start, stop), rows in zip(self._bounds, self.rows, strict=True):
            rows.add_(inputs.columns(start, stop).transposed_by(inputs.columns(start, self._width)))
        return 2 * len(inputs.values) * sum(rows.numel() for rows in self.rows)

    def full(self) -> Tensor:
        """The symmetric matrix, float32 ``[n, n]``."""
        result = torch.empty(self._width, self._width, device=self.rows[0].device)
        for (start, stop), rows in zip(self._bounds, self.rows, strict=True):
            result[start:stop, start:] = rows
            result[stop:, start:stop] = result[start:stop, stop:].T
        return result


class _Sums:
    """``H`` and ``D`` of one fold, adding up."""

    def __init__(self, width: int, device: torch.device, two_streams: bool) -> None:
        self.hessian = _Gram(width, device)
        self.mismatch = torch.zeros(width, width, device=device, dtype=torch.float64) if two_streams else None

    def tensors(self) -> list[Tensor]:
        return self.hessian.rows + ([] if self.mismatch is None else [self.mismatch])

    def moments(self) -> Moments:
        """In float32; the sums are given up one after the other, because they are the largest thing in memory."""
        hessian = self.hessian.full()
        self.hessian.rows.clear()
        mismatch, self.mismatch = self.mismatch, None
        return Moments(hessian, None if mismatch is None else mismatch.float())


class StatisticsAccumulator:
    """Gathers the statistics of one input group.

    Args:
        name: for error messages, the full name of the group's first linear.
        weights: by linear, the full-precision weight ``[out, n]`` in the dtype of the passes.
        needs: what to gather.

    Attributes:
        flops: floating-point operations of all products so far on this process, those of `finish` included.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor], needs: frozenset[Stat]) -> None:
        self.name, self.needs, self.flops = name, needs, 0
        first = next(iter(weights.values()))
        self._width, self._device = first.shape[1], first.device
        two = bool(needs & TWO_STREAMS)
        folds = 2 if Stat.FOLDS in needs else 1
        self._sums = [_Sums(self._width, self._device, two) for _ in range(folds)]
        self._counts = torch.zeros(2, dtype=torch.float64, device=self._device)  # tokens, sequences
        self._energy = {name: self._zeros(len(weight)) for name, weight in weights.items()}
        self._spread = {name: Spread(self._zeros(6)) for name in weights if Stat.EFFECTIVE_TOKENS in needs}
        self._ranges = ChannelRanges(self._width, self._device) if Stat.RANGES in needs else None
        self._samples = TokenSample(self._width, self._device, first.dtype) if Stat.SAMPLES in needs else None
        self._mismatch_gram = self._gram_for_energy(weights)
        self._weights = weights
        self._weights_t: dict[str, Operand] = {}
        if self._mismatch_gram is not None:  # W G in `finish`
            self.flops += sum(2 * weight.numel() * self._width for weight in weights.values())
        elif needs & {Stat.MISMATCH_ENERGY, Stat.EFFECTIVE_TOKENS}:
            self._weights_t = {name: Operand.of(weight.T) for name, weight in weights.items()}

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, device=self._device, dtype=torch.float64)

    def _gram_for_energy(self, weights: Mapping[str, Tensor]) -> _Gram | None:
        """Energy by W dX^T costs 2 n sum(m) a token, by the difference's Gram matrix (its upper triangle) some
        1.25 n^2, shared by all linears."""
        if Stat.MISMATCH_ENERGY not in self.needs or Stat.EFFECTIVE_TOKENS in self.needs:
            return None
        gram = _Gram(self._width, self._device)
        rows = sum(len(weight) for weight in weights.values())
        return gram if sum(part.numel() for part in gram.rows) < self._width * rows else None

    def add(self, quantized: Tensor, full: Tensor | None, first: int = 0) -> None:
        """One batch.

        Args:
            quantized: inputs ``[sequences, tokens, n]`` of the quantized stream.
            full: inputs ``[sequences, tokens, n]`` of the full-precision stream; ``None`` where only one runs.
            first: number of the batch's first sequence among all; folds are the even and the odd numbers.

        Raises:
            NumericalError: an input is NaN or Inf.
            ModelError: the streams have different tokens here.
        """
        self._check(quantized)
        if full is not None and full.shape != quantized.shape:
            raise ModelError(
                f"{self.name} gets inputs {list(quantized.shape)} in the quantized model and {list(full.shape)} in the "
                f"full-precision one: the block routes tokens in a way that cannot be followed. Leave it out: --ignore."
            )
        if self._ranges is not None:
            self._ranges.add(quantized)
        if self._samples is not None:
            self._samples.add(quantized, first)
        if Stat.BOUNDED in self.needs:
            quantized, full = bound_tokens(quantized, full)
        folds = len(self._sums)
        for fold, sums in enumerate(self._sums):
            own = quantized[(fold - first) % folds :: folds].reshape(-1, self._width)
            operand = Operand.of(own)
            self.flops += sums.hessian.add(operand)
            if full is not None and sums.mismatch is not None:
                other = full[(fold - first) % folds :: folds].reshape(-1, self._width)
                difference = Operand.of((other.float() - operand.values).to(own.dtype))
                sums.mismatch.add_(difference.transposed_by(operand))
                self.flops += 2 * own.numel() * self._width
                self._add_energy(difference, quantized.shape[1])
        self._counts += torch.tensor([quantized[..., 0].numel(), len(quantized)], device=self._device)

    def _check(self, inputs: Tensor) -> None:
        bad = share_not_finite(inputs)
        if bad is None:
            return
        raise NumericalError(
            f"the inputs of {self.name} hold NaN or Inf ({bad:.2%} of the entries). Check the checkpoint, or try "
            f"--dtype float32 if the model overflows in half precision."
        )

    def _add_energy(self, difference: Operand, tokens_per_sequence: int) -> None:
        if self._mismatch_gram is not None:
            self.flops += self._mismatch_gram.add(difference)
            return
        transposed = Operand(difference.values.T, difference.bfloat16)
        for name, weight in self._weights_t.items():
            squares = transposed.transposed_by(weight).square_()  # [t, out]
            self.flops += 2 * difference.values.numel() * squares.shape[1]
            self._energy[name].add_(squares.sum(0))
            if name in self._spread:
                self._spread[name].add(squares.sum(1).view(-1, tokens_per_sequence))

    def reduce_(self, all_reduce: Callable[[Tensor], None], all_gather: AllGather) -> None:
        """Join what was gathered by all processes.

        Args:
            all_reduce: replaces a float64 tensor by its sum over processes; called for the same shapes in the same
                order everywhere, also on a process that saw no batch.
            all_gather: gives the tensors of all processes, for what is not a sum.
        """
        tensors = [tensor for sums in self._sums for tensor in sums.tensors()]
        if self._mismatch_gram is not None:
            tensors += self._mismatch_gram.rows
        small = [self._counts, *self._energy.values(), *(spread.sums for spread in self._spread.values())]
        for tensor in tensors + small:
            all_reduce(tensor)
        for gathered in (self._ranges, self._samples):
            if gathered is not None:
                gathered.reduce_(all_gather)

    def finish(self) -> GroupStatistics:
        """The statistics; the accumulator must not be used after this.

        Raises:
            NumericalError: a sum overflows float32.
        """
        folds = tuple(sums.moments() for sums in self._sums)
        total = folds[0]
        if len(folds) > 1:
            parts = [fold.mismatch for fold in folds if fold.mismatch is not None]
            total = Moments(sum(fold.hessian for fold in folds), sum(parts) if parts else None)  # type: ignore[arg-type]
        energy = {name: value.float() for name, value in self._energy.items()}
        if self._mismatch_gram is not None:
            gram = self._mismatch_gram.full()
            energy = {name: _quadratic(weight.float(), gram) for name, weight in self._weights.items()}
        for part in (*folds, total):
            _check_sum(part.hessian, "squares of the inputs", self.name)
            _check_sum(part.mismatch, "products of inputs and mismatch", self.name)
        block = self.name.removesuffix(next(iter(self._weights)))
        for name, values in energy.items():
            _check_sum(values, "squares of the mismatch at the outputs", block + name)
        tokens, sequences = (int(count) for count in self._counts)
        spread = {name: spread.effective_tokens() for name, spread in self._spread.items()}
        return GroupStatistics(
            tokens,
            sequences,
            total,
            folds if len(folds) > 1 else (),
            energy,
            spread,
            ranges=None if self._ranges is None else self._ranges.finish(),
            samples=None if self._samples is None else self._samples.finish(),
        )


def _check_sum(values: Tensor | None, what: str, linear: str) -> None:
    if values is not None and share_not_finite(values):  # a sum of all can overflow where no entry does
        raise NumericalError(
            f"the {what} of {linear} overflow float32: numbers beyond 1e18 go through this block. Is the checkpoint "
            f"damaged? If not, leave the layer out: --ignore {linear}."
        )


def _quadratic(weight: Tensor, gram: Tensor) -> Tensor:
    """``w_i G w_i^T`` of every row, float32 ``[out]``."""
    return (product(weight, gram) * weight).sum(1)


@dataclasses.dataclass(frozen=True)
class Spread:
    """What `effective_tokens` needs of a quantity a token: six sums, so that parts can be added up.

    Args:
        sums: float64 ``[6]``: tokens, their sum and sum of squares; sequences, the sum and sum of squares of their
            means.
    """

    sums: Tensor

    def add(self, values: Tensor) -> None:
        """Values ``[sequences, tokens]`` of more sequences."""
        values = values.double()
        for start, numbers in ((0, values), (3, values.mean(1))):
            self.sums[start] += numbers.numel()
            self.sums[start + 1] += numbers.sum()
            self.sums[start + 2] += numbers.square().sum()

    def effective_tokens(self) -> float:
        """Tokens that count as independent; see `effective_tokens`."""
        tokens, total, squares, sequences, means, mean_squares = self.sums.tolist()
        variance = (squares - total**2 / tokens) / (tokens - 1) if tokens > 1 else 0.0
        if sequences < 2 or variance <= _NO_VARIANCE * squares / tokens:
            return float(tokens)
        length = tokens / sequences
        between = max(0.0, (mean_squares - means**2 / sequences) / (sequences - 1))
        return float(tokens / min(max(between * length / variance, 1.0), length))


def effective_tokens(values: Tensor) -> float:
    """Tokens that count as independent: all tokens over Kish's design effect of sampling whole sequences.

    The design effect is the variance of sequence means times the sequence length over the variance of tokens; it is 1
    for independent tokens and the sequence length for sequences of equal tokens.

    Args:
        values: ``[sequences, tokens]``, a quantity a token (here the mismatch energy).
    """
    spread = Spread(torch.zeros(6, dtype=torch.float64, device=values.device))
    spread.add(values)
    return spread.effective_tokens()

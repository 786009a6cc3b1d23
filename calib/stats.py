"""Statistics of one input group, streamed batch by batch.

With tokens as rows, ``X [t, n]`` the group's inputs in the full-precision model and ``X~`` those in the model
quantized so far, on the same tokens:

    H = X~^T X~ [n, n]        D = (X - X~)^T X~ [n, n]        energy_i = ||W_i (X - X~)^T||^2   a row of W

All are float32 sums over tokens (no normalisation: nothing that uses them depends on their scale). A method names what
it needs as `Stat`s; nothing else is gathered. Inputs in bfloat16 are multiplied exactly (`calib.precision`); their
difference is rounded to bfloat16 once, which is exact where X and X~ are within a factor of two of each other and
otherwise an unbiased relative error of 2^-9 on single entries.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from calib.errors import NumericalError
from calib.precision import product_t

__all__ = ["GroupStatistics", "LinearStatistics", "Moments", "Stat", "StatisticsAccumulator"]

T = TypeVar("T")


class Stat(enum.Enum):
    """What can be gathered on the inputs of a linear."""

    HESSIAN = "hessian"
    MISMATCH = "mismatch"
    MISMATCH_ENERGY = "mismatch energy"
    FOLDS = "hessian and mismatch on two halves of the sequences"
    EFFECTIVE_TOKENS = "number of tokens that count as independent"


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
    """

    tokens: int
    sequences: int
    moments: Moments | None
    folds: tuple[Moments, ...] = ()
    energy: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    effective_tokens: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
    def _moments(self) -> Moments:
        return _there(self.group.moments, Stat.HESSIAN)


def _there(value: T | None, stat: Stat) -> T:
    if value is None:
        raise ValueError(f"the method uses the statistic {stat.value!r} without naming it in its needs")
    return value


class StatisticsAccumulator:
    """Gathers the statistics of one input group.

    Args:
        name: for error messages, the full name of the group's first linear.
        weights: by linear, the full-precision weight ``[out, n]`` in the dtype of the passes.
        needs: what to gather.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor], needs: frozenset[Stat]) -> None:
        self.name, self.weights, self.needs = name, weights, needs
        first = next(iter(weights.values()))
        self._width, self._device = first.shape[1], first.device
        two = bool(needs & TWO_STREAMS)
        self._sums = [self._zeros(two) for _ in range(2 if Stat.FOLDS in needs else 1)]
        self._tokens = self._sequences = 0
        self._mismatch_gram: Tensor | None = None
        self._energy = {name: torch.zeros(len(w), device=self._device) for name, w in weights.items()}
        self._spread: dict[str, list[Tensor]] = {name: [] for name in weights}
        # Energy by W dX^T costs 2 n sum(m) a token, by the difference's Gram matrix 2 n^2, shared by all linears.
        rows = sum(len(w) for w in weights.values())
        self._by_gram = Stat.MISMATCH_ENERGY in needs and Stat.EFFECTIVE_TOKENS not in needs and self._width < rows
        if self._by_gram:
            self._mismatch_gram = torch.zeros(self._width, self._width, device=self._device)

    def _zeros(self, two_streams: bool) -> Moments:
        hessian = torch.zeros(self._width, self._width, device=self._device)
        return Moments(hessian, torch.zeros_like(hessian) if two_streams else None)

    def add(self, quantized: Tensor, full: Tensor | None) -> None:
        """One batch: inputs ``[sequences, tokens, n]`` of the quantized and of the full-precision stream.

        Raises:
            NumericalError: an input is NaN or Inf.
        """
        sequences = quantized.shape[0]
        for fold, sums in enumerate(self._sums):
            own = quantized[fold :: len(self._sums)].reshape(-1, self._width)
            sums.hessian.add_(product_t(own, own))
            if full is not None and sums.mismatch is not None:
                other = full[fold :: len(self._sums)].reshape(-1, self._width)
                difference = (other.float() - own.float()).to(own.dtype)
                sums.mismatch.add_(product_t(difference, own))
                self._add_energy(difference, quantized.shape[1])
        self._tokens += quantized[..., 0].numel()
        self._sequences += sequences
        self._check(quantized)

    def _check(self, inputs: Tensor) -> None:
        if bool(torch.isfinite(inputs.sum(dtype=torch.float32))):
            return
        bad = (~torch.isfinite(inputs)).float().mean().item()
        raise NumericalError(
            f"the inputs of {self.name} hold NaN or Inf ({bad:.2%} of the entries). Check the checkpoint, or try "
            f"--dtype float32 if the model overflows in half precision."
        )

    def _add_energy(self, difference: Tensor, tokens_per_sequence: int) -> None:
        if not self.needs & {Stat.MISMATCH_ENERGY, Stat.EFFECTIVE_TOKENS}:
            return
        if self._mismatch_gram is not None:
            self._mismatch_gram.add_(product_t(difference, difference))
            return
        for name, weight in self.weights.items():
            squares = product_t(difference.T, weight.T).square_()  # [t, out]
            self._energy[name].add_(squares.sum(0))
            if Stat.EFFECTIVE_TOKENS in self.needs:
                self._spread[name].append(squares.sum(1).view(-1, tokens_per_sequence).cpu())

    def finish(self) -> GroupStatistics:
        """The statistics; the accumulator must not be used after this."""
        total = self._sums[0]
        if len(self._sums) > 1:
            parts = [m.mismatch for m in self._sums if m.mismatch is not None]
            total = Moments(sum(m.hessian for m in self._sums), sum(parts) if parts else None)  # type: ignore[arg-type]
        energy = dict(self._energy)
        if self._mismatch_gram is not None:
            gram = self._mismatch_gram
            energy = {name: ((w.float() @ gram) * w.float()).sum(1) for name, w in self.weights.items()}
        spread = {name: effective_tokens(torch.cat(rows)) for name, rows in self._spread.items() if rows}
        folds = tuple(self._sums) if len(self._sums) > 1 else ()
        return GroupStatistics(self._tokens, self._sequences, total, folds, energy, spread)


def effective_tokens(values: Tensor) -> float:
    """Tokens that count as independent: all tokens over Kish's design effect of sampling whole sequences.

    The design effect is the variance of sequence means times the sequence length over the variance of tokens; it is 1
    for independent tokens and the sequence length for sequences of equal tokens.

    Args:
        values: ``[sequences, tokens]``, a quantity a token (here the mismatch energy).
    """
    sequences, length = values.shape
    token_variance = values.double().var().item()
    if sequences < 2 or token_variance == 0:
        return float(values.numel())
    effect = values.double().mean(1).var().item() * length / token_variance
    return values.numel() / min(max(effect, 1.0), float(length))

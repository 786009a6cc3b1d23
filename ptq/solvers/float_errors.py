"""The output errors that LLM-FP4's search makes small, as it measures them.

With quantized inputs ``X^ = X + D [t, n]`` and a quantized weight ``W^ = W + E [out, n]`` the error of a row is

    ||X^ w^_k - X w_k||^2 = ||X^ e_k + D w_k||^2

Where inputs are not quantized (`GramErrors`) the Gram matrix ``X^T X`` of all tokens says it. Where they are
(`TokenErrors`) it would have to be built anew for every activation quantizer, which costs as much as measuring some ten
candidates: a few hundred chosen tokens stand for all (`TokenChoice`).

Both also give a `Sketch`: with orthonormal ``Q [t, k]`` that spans the directions in which ``X^`` is largest,

    ||X^ e + D w||^2 ~ ||Q^T X^ e + Q^T D w||^2 + sum_j d_j e_j^2 + 2 f_j e_j w_j (+ what no weight changes)

where ``d`` and ``f`` are the diagonals of what is left of ``X^^T X^`` and ``X^^T D``: there the errors of columns,
which are as good as independent, cancel out. A few directions do: inputs have a mean and a few outlier channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from calib.precision import product
from ptq.activation_formats.static_input import StaticInput, power_of_two

__all__ = ["GramErrors", "Sketch", "TokenChoice", "TokenErrors", "WeightErrors", "output_errors", "total"]

_DIRECTIONS = 6
_ITERATIONS = 2  # of the power method that finds them
_SMALL = 1e-6  # times the largest eigenvalue: directions below it are left to the diagonal
_LARGE_SHARE = 4  # one of so many chosen tokens is there because of its size
_TOKEN_CHUNK = 1 << 22  # inputs, or outputs, in one temporary of `output_errors`


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A cheap stand-in for the errors of a weight's rows.

    Args:
        seen: ``Q^T X^`` float32 ``[k, n]``.
        drift: ``Q^T D`` float32 ``[k, n]``; ``None`` where inputs are not quantized.
        rest: ``d`` float32 ``[n]``.
        rest_drift: ``f`` float32 ``[n]``, or ``None`` likewise.
    """

    seen: Tensor
    drift: Tensor | None
    rest: Tensor
    rest_drift: Tensor | None


@dataclasses.dataclass(frozen=True)
class GramErrors:
    """Errors of rows for inputs as they are.

    Args:
        gram: ``X^T X`` float32 ``[n, n]``.
    """

    gram: Tensor

    def of_rows(self, rows: slice) -> GramErrors:
        """The same for some rows of the weight."""
        return self

    def errors(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Errors ``[r, c]`` of rows ``[r, n]`` and their candidates ``[r, c, n]``, which are overwritten."""
        error = rounded.sub_(weight[:, None]).flatten(0, 1)
        return product(error, self.gram).mul_(error).sum(1).view(rounded.shape[:2])

    def sketch(self) -> Sketch:
        """By the power method: ``Q`` spans ``X V``, so that ``Q^T X = (V^T G V)^(-1/2) V^T G``."""
        space = _start(self.gram)
        for _ in range(_ITERATIONS):
            space = torch.linalg.qr(product(self.gram, space)).Q
        moved = product(space.T.contiguous(), self.gram)
        values, vectors = torch.linalg.eigh(product(moved, space))
        kept = values > _SMALL * values[-1]
        inverse = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
        seen = product((vectors * inverse).T.contiguous(), moved)
        rest = (self.gram.diagonal() - seen.square().sum(0)).clamp_(min=0)
        return Sketch(seen, None, rest, None)


@dataclasses.dataclass(frozen=True)
class TokenErrors:
    """Errors of rows on some tokens, for quantized inputs.

    Args:
        seen: ``X^`` float32 ``[t, n]``; exact: ``X``; wanted: ``X W^T`` ``[t, out]``, all weighted.
    """

    seen: Tensor
    exact: Tensor
    wanted: Tensor

    def folded(self, quantizer: StaticInput) -> TokenErrors:
        """The same for a weight that was divided by the quantizer's powers of two."""
        if quantizer.shift is None:
            return self
        power = power_of_two(quantizer.shift.int())
        return TokenErrors(self.seen * power, self.exact * power, self.wanted)

    def of_rows(self, rows: slice) -> TokenErrors:
        """The same for some rows of the weight."""
        return TokenErrors(self.seen, self.exact, self.wanted[:, rows])

    def errors(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Errors ``[r, c]`` of rows ``[r, n]`` and their candidates ``[r, c, n]``."""
        rows, count, _ = rounded.shape
        output = product(rounded.flatten(0, 1), self.seen.T).view(rows, count, len(self.seen))
        return output.sub_(self.wanted.T[:, None]).square_().sum(2)

    def sketch(self) -> Sketch:
        space = _start(self.seen)[:, : len(self.seen)]
        for _ in range(_ITERATIONS - 1):
            space = product(self.seen.T, product(self.seen, space))
        basis = torch.linalg.qr(product(self.seen, space)).Q.T.contiguous()
        drift = self.seen - self.exact
        seen, seen_drift = product(basis, self.seen), product(basis, drift)
        rest = (self.seen.square().sum(0) - seen.square().sum(0)).clamp_(min=0)
        rest_drift = (self.seen * drift).sum(0) - (seen * seen_drift).sum(0)
        return Sketch(seen, seen_drift, rest, rest_drift)


WeightErrors = GramErrors | TokenErrors


def _start(matrix: Tensor) -> Tensor:
    """Where the power method begins, ``[n, k]``: the same random numbers on every device."""
    width = matrix.shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, min(_DIRECTIONS, width), generator=generator).to(matrix.device)


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """A few tokens that stand for all of a sample.

    Args:
        tokens: float32 ``[t, n]``.
        weight: float32 ``[t, 1]``, the square root of how many tokens each stands for.
    """

    tokens: Tensor
    weight: Tensor

    @classmethod
    def of(cls, samples: Tensor, limit: int) -> TokenChoice:
        """At most ``limit`` tokens of ``samples`` ``[t, n]``, which come in random order.

        The largest ones stand for themselves: single tokens whose inputs are a thousand times larger decide how far a
        range may be clipped, and no sample of the others would do for them.
        """
        if len(samples) <= limit:
            return cls(samples.float(), torch.ones(len(samples), 1, device=samples.device))
        size = samples.float().square().sum(1)
        order = size.argsort(descending=True, stable=True)
        large, others = order[: limit // _LARGE_SHARE], order[limit // _LARGE_SHARE :].sort().values
        few = others[: limit - len(large)]
        weight = torch.ones(limit, 1, device=samples.device)
        weight[len(large) :] = (len(others) / len(few)) ** 0.5
        return cls(samples[torch.cat([large, few])].float(), weight)

    def outputs(self, weight: Tensor) -> Tensor:
        """Weighted outputs ``[t, out]`` of ``weight``."""
        return product(self.tokens * self.weight, weight.T)

    def errors(self, quantizer: StaticInput, wanted: Tensor) -> TokenErrors:
        """Of rows with outputs ``wanted`` (`outputs`), for inputs that go through the quantizer."""
        return TokenErrors(quantizer(self.tokens).mul_(self.weight), self.tokens * self.weight, wanted)


def total(values: Tensor) -> float:
    """The sum of a matrix: of rows in float32, of their sums in float64."""
    return float(values.sum(1).sum(dtype=torch.float64))


def output_errors(
    inputs: Tensor, weight: Tensor, candidates: Sequence[tuple[StaticInput | None, Tensor]]
) -> list[float]:
    """``||X^ W^^T - X W^T||^2 / ||X W^T||^2`` of sampled inputs ``[t, n]``, 0 where the output is.

    Args:
        inputs: X.
        weight: W, float32 ``[out, n]``.
        candidates: activation quantizers (``None``: none) and quantized weights.
    """
    errors, energy = [0.0] * len(candidates), 0.0
    step = max(1, _TOKEN_CHUNK // max(weight.shape))
    for start in range(0, len(inputs), step):
        exact = inputs[start : start + step].float()
        wanted = product(exact, weight.T)
        energy += total(wanted.square())
        for index, (quantizer, quantized) in enumerate(candidates):
            found = product(exact if quantizer is None else quantizer(exact), quantized.T)
            errors[index] += total(found.sub_(wanted).square_())
    return [error / energy if energy else 0.0 for error in errors]

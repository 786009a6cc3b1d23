"""What is chosen together: linears with their real bits, those that must share a format merged into one item."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from calib.model.structure import linear_weight
from ptq.allocation.problem.candidates import Candidate
from ptq.scheme import Scheme

__all__ = ["Item", "Linear", "Table", "linears_of", "payload_bits", "stored_bits"]

FULL_PRECISION_BITS = 16


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear that a format is chosen for.

    Args:
        name: in the model.
        out_features: rows of its weight.
        in_features: columns of its weight.
    """

    name: str
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """Weights."""
        return self.out_features * self.in_features


@dataclasses.dataclass(frozen=True)
class Item:
    """Linears that get one format."""

    linears: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """The first linear's name, and how many share its format."""
        more = len(self.linears) - 1
        return self.linears[0].name + (f" (+{more})" if more else "")


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores and costs of items by candidate, as arrays ``[items, candidates]``.

    Args:
        items: the rows.
        candidates: the columns.
        scores: predicted loss.
        bits: real bits: codes, scales and zero points.
        stored: bits in the file, with the padding of packed words.
        sizes: weights ``[items]``.
    """

    items: tuple[Item, ...]
    candidates: tuple[Candidate, ...]
    scores: NDArray[np.float64]
    bits: NDArray[np.float64]
    stored: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @classmethod
    def make(
        cls, items: Sequence[Item], candidates: Sequence[Candidate], scores: Mapping[str, Sequence[float]]
    ) -> Table:
        """Sum scores and costs over the linears of every item; a costlier format never scores worse than a cheaper.

        Args:
            items: the rows.
            candidates: the columns.
            scores: by linear, a value for every candidate.
        """
        table = np.array([np.sum([scores[one.name] for one in item.linears], axis=0) for item in items])
        bits = _costs(items, candidates, payload_bits)
        for row, cost in zip(table, bits, strict=True):
            order = np.argsort(cost, kind="stable")
            row[order] = np.minimum.accumulate(row[order])
        sizes = np.array([sum(one.size for one in item.linears) for item in items], dtype=np.float64)
        return cls(tuple(items), tuple(candidates), table, bits, _costs(items, candidates, stored_bits), sizes)

    def with_scores(self, scores: NDArray[np.float64]) -> Table:
        """The same with other scores."""
        return dataclasses.replace(self, scores=scores)


def _costs(
    items: Sequence[Item], candidates: Sequence[Candidate], cost: Callable[[Linear, Scheme | None], int]
) -> NDArray[np.float64]:
    return np.array([[sum(cost(one, c.scheme) for one in item.linears) for c in candidates] for item in items], float)


def payload_bits(linear: Linear, scheme: Scheme | None) -> int:
    """Real bits of a linear's weight: codes, scales and zero points, without the padding of words."""
    if scheme is None:
        return linear.size * FULL_PRECISION_BITS
    return scheme.number_format.payload_bits(linear.out_features, linear.in_features, scheme)


def stored_bits(linear: Linear, scheme: Scheme | None) -> int:
    """Bits of a linear's tensors in the file."""
    if scheme is None:
        return linear.size * FULL_PRECISION_BITS
    specs = scheme.number_format.tensor_specs(linear.out_features, linear.in_features, scheme).values()
    return sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in specs)


def linears_of(model: nn.Module, names: Sequence[str]) -> tuple[Linear, ...]:
    """Linears of a model by full name, with their shapes."""
    shapes = ((name, linear_weight(model.get_submodule(name)).shape) for name in names)
    return tuple(Linear(name, int(shape[0]), int(shape[1])) for name, shape in shapes)

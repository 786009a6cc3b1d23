"""Integer weights by their parts, and the parts of a weight, for tests that are about integers."""

from __future__ import annotations

from torch import Tensor

from ptq import QuantizedWeight, Scheme

__all__ = ["integer_weight", "zero_of"]


def integer_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> QuantizedWeight:
    """A weight of the number format ``int`` (zero points only where it is asymmetric)."""
    return QuantizedWeight(codes, {"scale": scale} if zero is None else {"scale": scale, "zero": zero}, scheme)


def zero_of(weight: QuantizedWeight) -> Tensor | None:
    """The zero points, ``None`` of a symmetric weight."""
    return weight.params.get("zero")

"""The seam of activation formats: how a linear's input is rounded at run time, behind one record per format.

A *dynamic* format takes its ranges from the input itself, per token or per block. A *static* one keeps parameters from
calibration beside the weight. Either way the record turns activations into the values that the product sees; kernels
that multiply codes natively take the same codes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["ActivationFormat"]

TensorSpec = tuple[tuple[int, ...], torch.dtype]


class ActivationFormat(abc.ABC):
    """One row of the table of activation formats; instances are stateless and immutable."""

    name: str
    """What users type, e.g. ``"nvfp4"``."""
    summary: str
    """One line for ``ptq methods``."""
    bits: int
    """Width of one number."""
    block: int | None = None
    """Consecutive channels that share a scale; ``None`` is a whole token, or all tokens."""

    @property
    def static(self) -> bool:
        """Whether parameters from calibration are stored with the linear."""
        return bool(self.tensor_specs(self.block or 1))

    def unsupported_reason(self, in_features: int) -> str | None:
        """Why an input of this width cannot be rounded; ``None`` where it can."""
        if self.block is None or in_features % self.block == 0:
            return None
        return (
            f"its input has {in_features} channels, and the activation format {self.name} takes multiples of "
            f"{self.block}"
        )

    def tensor_specs(self, in_features: int) -> dict[str, TensorSpec]:
        """Shape and dtype of the stored parameters by their names inside the module; none for a dynamic format."""
        return {}

    def fit(self, largest: Tensor) -> dict[str, Tensor]:
        """The parameters of `tensor_specs` from calibration.

        Args:
            largest: float32 ``[in_features]``, the largest magnitude of every channel.
        """
        return {}

    @abc.abstractmethod
    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Values of ``x [..., in_features]`` after rounding, in its shape and dtype; computed in float32.

        What is not a number makes its block (or token) NaN: it is not hidden. Infinity does so, too, where ranges are
        dynamic, and saturates where they are fixed.
        """

    def plain_weight(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The weight ``[out, in]``, quantized for what `round` gives, as one for inputs as they are."""
        return weight

    def quantize(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """`round`, with the gradient of the identity."""
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _StraightThrough.apply(x, self, params)  # type: ignore[no-untyped-call]
            return result
        return self.round(x, params)


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: ActivationFormat, params: Mapping[str, Tensor]) -> Tensor:
        return record.round(x, params)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None

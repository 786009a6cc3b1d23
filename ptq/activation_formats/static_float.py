"""Floating-point activations with one scale from calibration, and LLM-FP4's shifts per channel.

``e2m1-static`` has a scale for the whole tensor. ``e2m1-shifted`` divides it, for every channel, by a power of two that
is kept beside it (`static_input`): the rounded input is that of the unchanged weight. ``e2m1-folded`` stores
the same, but the powers of two are in the weight, which was quantized for them: all channels of the rounded input share
one scale, so that both operands of the product are plain numbers of their formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.activation_formats.base import ActivationFormat, TensorSpec
from ptq.activation_formats.static_input import StaticInput, fit_static_input
from ptq.grids.floating_point import FloatFormat, float_formats

__all__ = ["FoldedFloat", "ShiftedFloat", "StaticFloat", "find_static_float", "static_float"]


class StaticFloat(ActivationFormat):
    """One scale for all tokens and channels.

    Args:
        number: the format of the rounded input.
    """

    suffix = "static"
    _about = "with one scale from calibration"

    def __init__(self, number: FloatFormat) -> None:
        self.number, self.bits = number, number.bits
        self.name, self.summary = f"{number.name}-{self.suffix}", f"{number.name.upper()} {self._about}"

    def tensor_specs(self, in_features: int) -> dict[str, TensorSpec]:
        return {"input_scale": ((1,), torch.float32)}

    def fit(self, largest: Tensor) -> dict[str, Tensor]:
        return self.params(fit_static_input(largest, self.number, shift=self.suffix != "static"))

    def params(self, quantizer: StaticInput) -> dict[str, Tensor]:
        """What is stored of a quantizer."""
        return {"input_scale": quantizer.scale}

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return StaticInput(self.number, params["input_scale"], params.get("input_shift"))(x)


class ShiftedFloat(StaticFloat):
    """One scale, divided by a power of two for every channel."""

    suffix = "shifted"
    _about = "with one scale from calibration, shifted by a power of two per channel"

    def tensor_specs(self, in_features: int) -> dict[str, TensorSpec]:
        return super().tensor_specs(in_features) | {"input_shift": ((in_features,), torch.uint8)}

    def params(self, quantizer: StaticInput) -> dict[str, Tensor]:
        assert quantizer.shift is not None
        return {"input_scale": quantizer.scale, "input_shift": quantizer.shift}


class FoldedFloat(ShiftedFloat):
    """The same, for a weight that was quantized with the powers of two in it."""

    suffix = "folded"
    _about = "with one scale from calibration, the channels' powers of two in the weight"

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return StaticInput(self.number, params["input_scale"], params["input_shift"], folded=True)(x)

    def plain_weight(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return StaticInput(self.number, params["input_scale"], params["input_shift"]).unfolded_weight(weight)


_KINDS = {kind.suffix: kind for kind in (StaticFloat, ShiftedFloat, FoldedFloat)}


def static_float(number: FloatFormat, suffix: str) -> StaticFloat:
    """The record of a format and a kind, ``static``, ``shifted`` or ``folded``."""
    return _KINDS[suffix](number)


def find_static_float(name: str) -> StaticFloat | None:
    """The record of a name like ``e3m0-shifted``; ``None`` if it is not one."""
    match = re.fullmatch(rf"(e\d)(m\d)-({'|'.join(_KINDS)})", name)
    if match is None:
        return None
    numbers = {number.name: number for bits in range(4, 9) for number in float_formats(bits)}
    number = numbers.get(match[1] + match[2])
    return None if number is None else static_float(number, match[3])

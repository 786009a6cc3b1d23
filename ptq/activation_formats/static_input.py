"""Activations rounded onto a floating-point grid whose scale was fixed by calibration, the same for every token.

A linear's input has one format and one scale. Channels whose range is smaller have a *shift*: their scale is the
tensor's divided by ``2^shift``. This is LLM-FP4's pre-shifted exponent bias (arXiv 2310.16836, section 4.2): with
``rho`` the tensor's real-valued bias and ``b~_j`` that of channel ``j`` alone,

    shift_j = clip(round(b~_j - rho), 0, 2^e - 1)        e exponent bits,

here with scales in the place of biases, ``b~_j - rho = log2(scale / scale_j)``. A shift is a power of two, so it can
stand on either side of the product without changing a bit of it (but for underflow): in the rounded input, or in the
weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ptq.grids.floating_point import FloatFormat

__all__ = ["StaticInput", "fit_static_input", "largest_shift", "power_of_two"]

_SMALLEST_SCALE = 2.0**-90  # of inputs that are all zero; shifted by the most, it is still a normal number
_FLOAT32_MANTISSA, _FLOAT32_BIAS = 23, 127


@dataclasses.dataclass(frozen=True)
class StaticInput:
    """How a linear's input is rounded.

    Args:
        number: the format.
        scale: float32 ``[1]``.
        shift: uint8 ``[n]``, 0 to `largest_shift`; ``None`` is 0 for all channels.
        folded: the result is for a weight that was divided by the shifts' powers of two: all channels of it have the
            tensor's scale.
    """

    number: FloatFormat
    scale: Tensor
    shift: Tensor | None = None
    folded: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[..., n]`` rounded: values in the dtype of ``x``. NaN stays NaN, infinity saturates."""
        scale = self.channel_scale()
        return self.number.round(x.float() / scale).mul_(self.scale if self.folded else scale).to(x.dtype)

    def channel_scale(self) -> Tensor:
        """The scale of every channel, float32 ``[n]``; ``[1]`` where all have the tensor's."""
        return self.scale if self.shift is None else self.scale * power_of_two(-self.shift.int())

    def folded_weight(self, weight: Tensor) -> Tensor:
        """The weight ``[out, n]``, float32, for inputs that come folded; the inverse of `unfolded_weight`."""
        return weight if self.shift is None else weight * power_of_two(-self.shift.int())

    def unfolded_weight(self, weight: Tensor) -> Tensor:
        """A weight for folded inputs as one for inputs as they are."""
        return weight if self.shift is None else weight * power_of_two(self.shift.int())


def largest_shift(number: FloatFormat) -> int:
    """``2^e - 1`` of a format with ``e`` exponent bits."""
    return int(2**number.exponent_bits) - 1


def fit_static_input(absmax: Tensor, number: FloatFormat, ratio: float = 1.0, *, shift: bool = True) -> StaticInput:
    """The quantizer whose range is ``ratio`` times the largest magnitude.

    Args:
        absmax: float32 ``[n]``, the largest magnitude of every channel.
        number: the format.
        ratio: 1 clips nothing where there are no shifts.
        shift: whether channels have shifts; a channel that is always zero has the largest.
    """
    scale = (absmax.max() * ratio / number.maximum).clamp_(min=_SMALLEST_SCALE).reshape(1)
    if not shift:
        return StaticInput(number, scale)
    own = absmax / number.maximum
    exponents = torch.log2(scale / own.clamp(min=2.0**-126)).round_()
    return StaticInput(number, scale, exponents.clamp_(0, largest_shift(number)).to(torch.uint8))


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` float32 of int32 exponents from -126 to 127, by its bits: `torch.exp2` may round."""
    return (exponent + _FLOAT32_BIAS).bitwise_left_shift(_FLOAT32_MANTISSA).view(torch.float32)

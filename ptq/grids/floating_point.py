"""Small floating-point formats: one quantizer for every split of 4 to 8 bits into sign, exponent and mantissa.

A format ``EeMm`` has ``2^e`` exponents and ``2^m`` mantissas, all of them numbers: there is neither infinity nor NaN,
except where the hardware's format gives up its largest magnitudes for them (``reserved``). The lowest exponent holds
zero and the subnormals. The bias is a whole number; a real-valued bias ``b`` (LLM-FP4) is the scale ``2^(bias - b)``.

    value = (-1)^s * 2^(max(p, 1) - bias) * (m / 2^M + [p > 0])            p exponent field, m mantissa field

Numbers are rounded to the nearest value, ties to the even mantissa (formats without a mantissa: to the larger one,
except between zero and the first value), and saturate at the largest one. Two ways give the same values: arithmetic on
float32 bits for activations (`FloatFormat.round`), a table of levels for solvers (`FloatFormat.grid`). Both use only
comparisons and products with powers of two, so that every device gives the same codes.

*Codes* count the levels of the grid upwards, ``0`` the most negative, without a code for minus zero. *Patterns* are the
bits of a stored number, sign and magnitude, as hardware reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.grids.grid import Grid

__all__ = ["E2M1", "E4M3", "E5M2", "FloatFormat", "FloatGrid", "float_format", "float_formats"]

_MIN_BITS, _MAX_BITS = 4, 8
_MAX_EXPONENT_BITS = 5  # as the formats of hardware; with 6 and 7 the largest scale overflows half precision
_FLOAT32_MANTISSA, _FLOAT32_BIAS = 23, 127
_EXPONENT_BITS, _MAGNITUDE_BITS = 0x7F800000, 0x7FFFFFFF  # masks of float32


@dataclasses.dataclass(frozen=True)
class FloatGrid(Grid):
    """The levels of a floating-point format; ties are rounded as `FloatFormat.round` rounds them.

    Args:
        thresholds: float32 ``[L - 1]``; the largest number that is still rounded to level ``i`` or below.
    """

    thresholds: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def nearest(self, x: Tensor) -> Tensor:
        """Code (uint8, the shape of ``x``) of the level nearest to ``x``."""
        return torch.bucketize(x.contiguous(), self.thresholds.to(x)).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A signed floating-point format of 4 to 8 bits.

    Args:
        exponent_bits: width of the exponent, at least 1.
        mantissa_bits: width of the mantissa, from 0.
        reserved: number of the largest magnitudes that stand for infinity or NaN and are never used (1 for the
            hardware's E4M3, 4 for its E5M2).

    Raises:
        UsageError: sign, exponent and mantissa are not 4 to 8 bits together.
    """

    exponent_bits: int
    mantissa_bits: int
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not _MIN_BITS <= self.bits <= _MAX_BITS:
            raise UsageError(
                f"a floating-point format has a sign, 1 or more exponent bits and 0 or more mantissa bits, "
                f"{_MIN_BITS} to {_MAX_BITS} bits in all; got {self.exponent_bits} exponent and {self.mantissa_bits} "
                f"mantissa bits."
            )

    @property
    def name(self) -> str:
        """What users type, e.g. ``"e2m1"``."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Width of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias: ``2^(e-1) - 1``, as in IEEE 754 and the formats of hardware."""
        return (1 << self.exponent_bits - 1) - 1

    @property
    def magnitudes(self) -> int:
        """Number of values from zero to the maximum."""
        return (1 << self.exponent_bits + self.mantissa_bits) - self.reserved

    @property
    def maximum(self) -> float:
        """The largest value, e.g. 6 for E2M1 and 448 for the hardware's E4M3."""
        return self._magnitude(self.magnitudes - 1)

    @property
    def smallest_normal(self) -> float:
        """The smallest value with an implicit leading one."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value, ``floor(log2(maximum))``."""
        return ((self.magnitudes - 1) >> self.mantissa_bits) - self.bias

    def _magnitude(self, pattern: int) -> float:
        exponent, mantissa = divmod(pattern, 2**self.mantissa_bits)
        return math.ldexp(mantissa / 2**self.mantissa_bits + (exponent > 0), max(exponent, 1) - self.bias)

    def round(self, x: Tensor) -> Tensor:
        """The nearest values, float32 of the shape of ``x``; NaN stays NaN, infinity becomes the maximum."""
        x = x.float().clamp(-self.maximum, self.maximum)
        # 2^floor(log2 |x|) by keeping the exponent's bits: exact, unlike a logarithm.
        power = x.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
        step = power.clamp_(min=self.smallest_normal).mul_(2.0**-self.mantissa_bits)
        return (x / step).round_().mul_(step)

    def patterns(self, values: Tensor) -> Tensor:
        """Bits of ``values`` (which must be values of the format, as `round` gives them), uint8; keeps minus zero."""
        bits = values.float().view(torch.int32)
        magnitude = values.float().abs()
        rebias = (_FLOAT32_BIAS - self.bias) << self.mantissa_bits
        normal = (bits & _MAGNITUDE_BITS).bitwise_right_shift(_FLOAT32_MANTISSA - self.mantissa_bits) - rebias
        subnormal = (magnitude * (2.0**self.mantissa_bits / self.smallest_normal)).to(torch.int32)
        pattern = torch.where(magnitude >= self.smallest_normal, normal, subnormal)
        return torch.where(bits < 0, pattern | self._sign, pattern).to(torch.uint8)

    @property
    def _sign(self) -> int:
        return 1 << self.bits - 1

    def values(self, patterns: Tensor) -> Tensor:
        """Values of stored bits, float32; reserved patterns become NaN."""
        return _pattern_values(self, patterns.device)[patterns.long()]

    def codes_of_patterns(self, patterns: Tensor) -> Tensor:
        """Codes of the grid for stored bits, uint8; minus zero becomes zero.

        Raises:
            ValueError: a reserved pattern (infinity or NaN), or one of more bits than the format has.
        """
        if patterns.numel() and int(patterns.max()) >= 2 * self._sign:
            raise ValueError(f"{int(patterns.max())} is not a number of {self.bits} bits")
        magnitude = (patterns & (self._sign - 1)).to(torch.int16)
        if self.reserved and patterns.numel() and int(magnitude.max()) >= self.magnitudes:
            raise ValueError(f"the stored {self.name} numbers hold infinity or NaN")
        centre = self.magnitudes - 1
        return torch.where(patterns >= self._sign, centre - magnitude, centre + magnitude).to(torch.uint8)

    def patterns_of_codes(self, codes: Tensor) -> Tensor:
        """Stored bits of codes of the grid, uint8; zero is plus zero.

        Raises:
            ValueError: a code that the grid does not have.
        """
        if codes.numel() and int(codes.max()) > 2 * (self.magnitudes - 1):
            raise ValueError(f"code {int(codes.max())} is not one of the {2 * self.magnitudes - 1} of {self.name}")
        offset = codes.to(torch.int16) - (self.magnitudes - 1)
        return torch.where(offset < 0, self._sign - offset, offset).to(torch.uint8)

    def grid(self, device: torch.device | None = None) -> FloatGrid:
        """The table of levels, for solvers; ``code = magnitudes - 1`` is zero."""
        return _grid(self, torch.device("cpu") if device is None else device)


E2M1 = FloatFormat(2, 1)
"""The 4-bit numbers of NVFP4 and MXFP4."""
E4M3 = FloatFormat(4, 3, reserved=1)
"""The hardware's E4M3 (``torch.float8_e4m3fn``): up to 448, one pattern is NaN."""
E5M2 = FloatFormat(5, 2, reserved=4)
"""The hardware's E5M2 (``torch.float8_e5m2``): up to 57344, with infinity and NaN."""


def float_format(name: str) -> FloatFormat:
    """The format of a name like ``"e3m0"``, without reserved patterns.

    Raises:
        UsageError: not such a name, or not 4 to 8 bits.
    """
    match = re.fullmatch(r"e(\d)m(\d)", name.lower())
    if match is None:
        raise UsageError(f"{name!r} is not a floating-point format: write exponent and mantissa bits, e.g. e2m1.")
    return FloatFormat(int(match[1]), int(match[2]))


def float_formats(bits: int) -> tuple[FloatFormat, ...]:
    """All formats ``EeMm`` of that width with 1 to 5 exponent bits, the most usual first (E2M1, E4M3).

    ``E1Mm`` is the symmetric integer grid.
    """
    widths = range(1, min(bits - 1, _MAX_EXPONENT_BITS) + 1)
    return tuple(FloatFormat(e, bits - 1 - e) for e in sorted(widths, key=lambda e: abs(e - bits // 2)))


@functools.lru_cache(maxsize=64)
def _pattern_values(number: FloatFormat, device: torch.device) -> Tensor:
    usable = [number._magnitude(pattern) for pattern in range(number.magnitudes)]
    magnitudes = torch.tensor(usable + [float("nan")] * number.reserved)
    return torch.cat([magnitudes, -magnitudes]).to(device)


@functools.lru_cache(maxsize=64)
def _grid(number: FloatFormat, device: torch.device) -> FloatGrid:
    positive = torch.tensor([number._magnitude(pattern) for pattern in range(number.magnitudes)])
    levels = torch.cat([-positive[1:].flip(0), positive])
    middles = (levels[1:] + levels[:-1]) / 2
    # A tie belongs to the level below its threshold: where it has to go up, the threshold is the number before it.
    goes_up = number.round(middles) > middles
    lower = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
    return FloatGrid(levels.to(device), thresholds=torch.where(goes_up, lower, middles).to(device))

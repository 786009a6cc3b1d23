"""Floating-point numbers of 4 to 8 bits: golden tables, exact fractions, torch's own float8 casts."""

from __future__ import annotations

import bisect
import itertools
from fractions import Fraction

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import helpers as nvfp4
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import UsageError
from ptq.grids.floating_point import E2M1, E4M3, E5M2, FloatFormat, float_format

ALL = [FloatFormat(e, bits - 1 - e) for bits in range(4, 9) for e in range(1, bits)] + [E4M3, E5M2]
GOLDEN = {  # magnitudes from zero
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "e2m3": [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)],
    "e3m2": [0, 1 / 16, 1 / 8, 3 / 16]
    + [x * 2**p for p in range(-2, 5) for x in (1, 1.25, 1.5, 1.75)],
}  # fmt: skip


def name(number: FloatFormat) -> str:
    return f"{number.name}{'r' if number.reserved else ''}"


def exact(number: FloatFormat, pattern: int) -> Fraction:
    """The definition, with fractions."""
    sign, rest = divmod(pattern, 2 ** (number.bits - 1))
    exponent, mantissa = divmod(rest, 2**number.mantissa_bits)
    significand = Fraction(mantissa, 2**number.mantissa_bits) + (1 if exponent else 0)
    return (-1) ** sign * Fraction(2) ** (max(exponent, 1) - (2 ** (number.exponent_bits - 1) - 1)) * significand


def nearest(table: list[Fraction], mantissa_bits: int, x: float) -> float:
    """Slow rounding: of the two nearest magnitudes the even pattern; without a mantissa the larger, but zero before
    all."""
    size = abs(Fraction(x))
    above = min(bisect.bisect_left(table, size), len(table) - 1)
    below = max(above - 1, 0)
    left, right = abs(size - table[below]), abs(table[above] - size)
    if left == right:
        even = below if below % 2 == 0 else above
        chosen = even if mantissa_bits or below == 0 else above
    else:
        chosen = below if left < right else above
    return float(table[chosen]) * (-1 if x < 0 else 1)


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_tables(key: str) -> None:
    number = float_format(key)
    patterns = torch.arange(number.magnitudes, dtype=torch.uint8)
    assert number.values(patterns).tolist() == GOLDEN[key]
    assert number.grid().levels.tolist() == sorted({*GOLDEN[key], *(-x for x in GOLDEN[key])})
    assert number.maximum == GOLDEN[key][-1]


@pytest.mark.parametrize("number", ALL, ids=name)
def test_every_pattern_has_the_value_of_the_definition(number: FloatFormat) -> None:
    patterns = torch.arange(2**number.bits)
    values = number.values(patterns)
    for pattern, value in zip(patterns.tolist(), values.tolist(), strict=True):
        if pattern % 2 ** (number.bits - 1) < number.magnitudes:
            assert Fraction(value) == exact(number, pattern)
        else:
            assert value != value
    kept = patterns[~values.isnan()]
    assert torch.equal(number.patterns(values[~values.isnan()]), kept.to(torch.uint8))  # minus zero included
    assert number.maximum == float(exact(number, number.magnitudes - 1))
    assert 2.0**number.max_exponent <= number.maximum < 2.0 ** (number.max_exponent + 1)


@pytest.mark.parametrize("number", ALL, ids=name)
def test_rounding_by_arithmetic_and_by_the_table_is_the_slow_rounding(number: FloatFormat) -> None:
    table = [exact(number, pattern) for pattern in range(number.magnitudes)]
    levels = number.grid().levels
    middles = (levels[1:] + levels[:-1]) / 2
    spread = torch.randn(64, generator=torch.Generator().manual_seed(0)) * levels[-1] / 3
    up, down = torch.full_like(middles, torch.inf), torch.full_like(middles, -torch.inf)
    x = torch.cat([levels, middles, middles.nextafter(up), middles.nextafter(down), spread, 9 * levels[:1]])
    wanted = torch.tensor([nearest(table, number.mantissa_bits, value) for value in x.tolist()])

    assert torch.equal(number.round(x), wanted)
    grid = number.grid()
    assert torch.equal(grid.values(grid.nearest(x)), wanted)
    assert torch.equal(grid.snap(x), wanted)
    assert torch.equal(grid.codes_of(grid.snap(x)), grid.nearest(x))


@pytest.mark.parametrize("number", [E4M3, E5M2], ids=name)
@given(st.integers(0, 10**6), st.floats(-20, 20))
@settings(max_examples=40, deadline=None)
def test_8_bits_are_torchs_own_casts(number: FloatFormat, seed: int, power: float) -> None:
    dtype = torch.float8_e4m3fn if number == E4M3 else torch.float8_e5m2
    x = torch.randn(512, generator=torch.Generator().manual_seed(seed)) * 2**power
    cast = x.clamp(-number.maximum, number.maximum).to(dtype)
    assert torch.equal(number.round(x), cast.float())
    assert torch.equal(number.patterns(number.round(x)), cast.view(torch.uint8))
    finite = torch.arange(256, dtype=torch.uint8)[number.values(torch.arange(256)).isfinite()]
    assert len(finite) == 2 * number.magnitudes
    assert torch.equal(number.values(finite), finite.view(dtype).float())


def test_e2m1_is_what_compressed_tensors_rounds_and_packs() -> None:
    x = torch.cat([torch.linspace(-8, 8, 1025), torch.tensor([0.5, -6.0, 3.0, -0.0, 0.0, 5.0, -2.5])])
    values = E2M1.round(x)
    assert torch.equal(values, FP4_E2M1_DATA.cast_to_fp4(x))
    patterns = E2M1.patterns(values)
    packed = nvfp4.pack_fp4_to_uint8(values[:1032].view(1, -1))
    assert torch.equal(packed[0], patterns[:1032:2] | patterns[1:1032:2] << 4)


@pytest.mark.parametrize("number", ALL, ids=name)
def test_codes_and_patterns_are_inverse(number: FloatFormat) -> None:
    grid = number.grid()
    codes = torch.arange(len(grid.levels)).to(torch.uint8)
    patterns = number.patterns_of_codes(codes)
    assert torch.equal(number.values(patterns), grid.levels)
    assert torch.equal(number.codes_of_patterns(patterns), codes)
    minus_zero = torch.tensor([2 ** (number.bits - 1)], dtype=torch.uint8)
    assert grid.values(number.codes_of_patterns(minus_zero)).item() == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="infinity or NaN"):
        E4M3.codes_of_patterns(torch.tensor([0x7F], dtype=torch.uint8))
    with pytest.raises(ValueError, match="not a number of 4 bits"):
        E2M1.codes_of_patterns(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(ValueError, match="code 15"):
        E2M1.patterns_of_codes(torch.tensor([15], dtype=torch.uint8))
    for wrong in ("e0m3", "e2m0", "e5m4", "fp4", "e2m1x"):
        with pytest.raises(UsageError):
            float_format(wrong)


def test_no_number_stays_no_number_and_infinity_saturates() -> None:
    for number, sign in itertools.product(ALL, (1, -1)):
        x = torch.tensor([float("nan"), sign * float("inf"), sign * 1e-40])
        out = number.round(x)
        assert out[0].isnan()
        assert out[1:].tolist() == [sign * number.maximum, 0.0]

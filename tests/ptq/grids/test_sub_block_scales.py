"""Scales of blocks and sub-blocks: figures on Gaussian weights, a slow exhaustive search, what is not a number."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.grids.codebooks import GAUSSIAN, ITQ3_MAGNITUDES, TERNARY_MAGNITUDES, symmetric_levels
from ptq.grids.sub_block_scales import SubBlockLayout, fit_sub_block_scales

ITQ3 = SubBlockLayout(256, 32, (15, 12, 10, 8), ITQ3_MAGNITUDES, 0.2545)
FINE = SubBlockLayout(256, 16, (15, 13, 12, 10, 9, 8, 7, 6), ITQ3_MAGNITUDES, 0.2545)
TERNARY = SubBlockLayout(256, 256, (1,), TERNARY_MAGNITUDES, 1.224)
ONE_SCALE = {bits: SubBlockLayout(256, 256, (1,), magnitudes, 1.0) for bits, magnitudes in GAUSSIAN.items()}


def gauss(rows: int, width: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, layout: SubBlockLayout, importance: Tensor | None = None) -> Tensor:
    scale, index = fit_sub_block_scales(weight, layout, importance)
    effective = layout.expand(scale, index).repeat_interleave(layout.sub, 1)[:, : weight.shape[1]]
    grid = symmetric_levels(layout.magnitudes)
    units = weight / effective.clamp(min=1e-30)
    return grid.values(grid.nearest(units)) * effective


def relative(weight: Tensor, layout: SubBlockLayout) -> float:
    return float((weight - rounded(weight, layout)).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("layout", "expected", "tolerance"),
    [
        (ITQ3, 0.0273, 0.0005),
        (FINE, 0.0219, 0.0005),
        (TERNARY, 0.1888, 0.002),
        (ONE_SCALE[2], 0.1165, 0.002),
        (ONE_SCALE[3], 0.0333, 0.0005),
        (ONE_SCALE[4], 0.0085, 0.0003),
    ],
    ids=["itq3s", "itq3s-104", "ternary", "gauss2", "gauss3", "gauss4"],
)
def test_relative_error_on_gaussian_weights(layout: SubBlockLayout, expected: float, tolerance: float) -> None:
    assert relative(gauss(400, 512), layout) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_codebooks_are_fixed_points_of_lloyds_iteration(bits: int) -> None:
    """Every level is the mean of the Gaussian between the middles to its neighbours."""
    levels = GAUSSIAN[bits]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    for level, (low, high) in zip(levels, itertools.pairwise(edges), strict=True):
        mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        assert level == pytest.approx((density(low) - density(high)) / mass, abs=1e-12)


def test_the_search_is_as_good_as_trying_everything() -> None:
    layout = SubBlockLayout(8, 4, (15, 12, 10, 8), ITQ3_MAGNITUDES, 0.2545)
    weight = gauss(12, 8, seed=3)
    levels = symmetric_levels(ITQ3_MAGNITUDES).levels
    error = (weight - rounded(weight, layout)).square().sum(1)
    scales = torch.logspace(-1.6, 0.6, 700, dtype=torch.float64) * 0.02 * 0.2545 / 11
    least = torch.full((12,), torch.inf, dtype=torch.float64)
    for pair in itertools.product(layout.multipliers, repeat=2):
        steps = scales[:, None] * torch.tensor(pair).repeat_interleave(4)  # [700, 8]
        values = steps[..., None] * levels  # [700, 8, levels]
        errors = (weight[:, None, :, None] - values).square().amin(-1).sum(-1)  # [12, 700]
        least = torch.minimum(least, errors.amin(1))
    assert float((error / least).mean()) < 1.05


def test_importance_decides_where_the_error_goes() -> None:
    weight, importance = gauss(50, 512), torch.ones(512)
    weight[:, ::2] *= 6
    importance[1::2] = 1000.0
    plain = (weight - rounded(weight, ITQ3)).square()[:, 1::2].sum()
    weighted = (weight - rounded(weight, ITQ3, importance)).square()[:, 1::2].sum()
    assert weighted < 0.6 * plain


@pytest.mark.parametrize("width", [32, 44, 256, 300, 576])
def test_columns_that_do_not_exist_have_no_influence(width: int) -> None:
    weight = gauss(4, width, seed=1)
    scale, index = fit_sub_block_scales(weight, ITQ3)
    assert scale.shape == (4, math.ceil(width / 256))
    assert index.shape == (4, math.ceil(width / 32))
    assert relative(weight, ITQ3) < 0.04


def test_blocks_of_zeros_have_a_scale_of_zero() -> None:
    weight = gauss(3, 512)
    weight[1] = 0.0
    weight[2, 256:] = 0.0
    scale, _ = fit_sub_block_scales(weight, ITQ3)
    assert (scale == 0).tolist() == [[False, False], [True, True], [False, True]]
    assert float(rounded(weight, ITQ3)[1].abs().max()) == 0.0


@pytest.mark.parametrize(("size", "limit"), [(1e-3, 0.03), (3e-5, 0.03), (3e-6, 0.2)])
def test_subnormal_scales(size: float, limit: float) -> None:
    assert relative(gauss(20, 512) * (size / 0.02), ITQ3) < limit


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-8])
def test_weights_below_every_scale_are_no_worse_than_zeros(size: float) -> None:
    weight = gauss(20, 256) * size
    assert relative(weight, ITQ3) <= 1.001
    scale, _ = fit_sub_block_scales(weight, ITQ3)
    assert bool((scale == 0).all()) == (size < 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = gauss(2, 256)
    weight[1, 7] = bad
    with pytest.raises(NumericalError, match="holds NaN or Inf"):
        fit_sub_block_scales(weight, ITQ3)


def test_scales_that_overflow_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"overflows float16 \(.*the largest is 65504"):
        fit_sub_block_scales(gauss(2, 256) * 1e9, ITQ3)

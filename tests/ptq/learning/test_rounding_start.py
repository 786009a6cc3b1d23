"""Where rounding with a gradient starts and ends: ranges, grids, starting points, soft rounding and its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.grids.scale_search import fit_scales
from ptq.learning import LearnedConfig
from ptq.learning.linear import LinearLearner, soft_rounding
from ptq.learning.rounding import group_range, levels_of, round_groups, stored
from ptq.scheme import SCALE_DTYPES, Scheme
from tests.ptq.learning.drawn import KINDS, generator, normal
from tests.support.integer_weights import integer_weight, zero_of

# -- ranges and grids --------------------------------------------------------------------------------------------------


def test_a_range_holds_zero_and_sends_its_gradient_to_the_extreme_entries() -> None:
    z = torch.tensor([[[1.0, -3.0, 2.0], [1.0, 3.0, 2.0], [-1.0, -3.0, -2.0], [0.0, 0.0, 0.0]]]).requires_grad_()
    low, high = group_range(z)
    assert low.flatten().tolist() == [-3.0, 0.0, -3.0, 0.0]
    assert high.flatten().tolist() == [2.0, 3.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad((low * 10 + high).sum(), z)
    assert gradient.tolist() == [[[0.0, 10.0, 1.0], [0.0, 1.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_have_values_that_can_be_stored_and_keep_their_gradient(dtype: Any) -> None:
    scheme = Scheme(4, scale_dtype=dtype)
    scale = (normal(50) * 0.1).requires_grad_()
    found = stored(scale, scheme)
    assert torch.equal(found, found.to(SCALE_DTYPES[dtype]).float())
    torch.testing.assert_close(found, scale, rtol=2.0**-8, atol=1e-7)
    assert torch.equal(torch.autograd.grad(found.sum(), scale)[0], torch.ones(50))
    assert (stored(torch.zeros(3), scheme) > 0).all(), "a scale of zero would divide by zero"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_side_that_reaches_further_gets_the_extra_level(bits: int) -> None:
    half = 2 ** (bits - 1)
    low, high = torch.tensor([[[-4.0]], [[-1.0]], [[-2.0]]]), torch.tensor([[[1.0]], [[4.0]], [[2.0]]])
    levels = levels_of(low, high, Scheme(bits), zero_gradient=False)
    assert torch.equal(levels.scale.flatten(), torch.tensor([4.0, -4.0, 2.0]) / half)
    assert torch.equal(levels.zero, torch.full((3, 1, 1), float(half)))
    ends = torch.cat([low, high], -1)
    rounded = round_groups(ends, levels, None, "nearest")
    assert rounded[0, 0].tolist() == [-4.0, 1.0 if bits > 2 else rounded[0, 0, 1].item()]
    assert rounded[1, 0, 1] == 4.0
    assert rounded[2, 0].tolist() == [-2.0, 2.0 * (half - 1) / half]  # a draw: the side below zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_one(symmetric: bool) -> None:
    config = LearnedConfig()
    learner = LinearLearner(torch.zeros(2, 8), Scheme(3, symmetric, 4), config, generator(0))
    assert not learner.weight().any()
    assert not learner.fold().dequantize().any()
    found = torch.autograd.grad(learner.weight().sum(), list(learner.parameters.values()), allow_unused=True)
    assert all(one is None or torch.isfinite(one).all() for one in found)


@pytest.mark.parametrize("clip", ["off", "bounded"])
@pytest.mark.parametrize("group_size", [None, 8, 12])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_clipping_the_start_is_nearest_rounding_on_minmax_scales(
    bits: int, group_size: int | None, clip: Any
) -> None:
    weight, scheme = normal(16, 32), Scheme(bits, False, group_size, "float16")
    learner = LinearLearner(weight, scheme, LearnedConfig(clip=clip), generator(0))
    found = learner.fold()
    scale, zero = fit_scales(weight, scheme, "minmax")
    assert zero is not None
    assert zero_of(found) is not None
    assert torch.equal(found.params["scale"], scale)
    assert torch.equal(zero_of(found), zero)
    index = torch.arange(32) // (group_size or 32)
    codes = ((weight / scale.float()[:, index]).round() + zero[:, index]).clamp(0, 2**bits - 1)
    assert torch.equal(found.codes, codes.to(torch.uint8))


def test_smooth_clipping_starts_a_little_inside_the_range() -> None:
    weight, scheme = normal(16, 32), Scheme(4, False, 8, "bfloat16")
    found, whole = (
        LinearLearner(weight, scheme, LearnedConfig(clip=clip), generator(0)).fold().params["scale"].float()  # type: ignore[arg-type]
        for clip in ("sigmoid", "off")
    )
    torch.testing.assert_close(found / whole, torch.full_like(found, 1 / (1 + math.exp(-4))), rtol=2.0**-7, atol=0)


# -- starting points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["sigmoid", "bounded", "off"])
@pytest.mark.parametrize("rounding", KINDS)
@pytest.mark.parametrize("scheme", [Scheme(2, True, 8), Scheme(3, False, 12), Scheme(8, True, None)], ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_starting_point_is_kept_whatever_its_codes(scheme: Scheme, rounding: Any, clip: Any, seed: int) -> None:
    """Codes that nearest rounding would not choose, as error compensation makes them, and mirrored scales."""
    groups = scheme.groups(32)
    codes = torch.randint(0, 2**scheme.bits, (6, 32), generator=generator(seed)).to(torch.uint8)
    scale = (normal(6, groups, seed=seed) * 0.1).to(SCALE_DTYPES[scheme.scale_dtype])
    scale = torch.where(scale.abs() < 1e-3, torch.full_like(scale, 1e-3), scale)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 2**scheme.bits, (6, groups), generator=generator(seed + 1)).to(torch.uint8)
        scale = scale.abs()
    anchor = integer_weight(codes, scale, zero, scheme)
    config = LearnedConfig(rounding=rounding, clip=clip)
    learner = LinearLearner(normal(6, 32, seed=seed + 2), scheme, config, generator(0), anchor)
    found = learner.fold()
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.params["scale"], scale)
    if rounding != "soft":
        assert torch.equal(learner.weight().detach(), anchor.dequantize())


def test_a_weight_starts_as_near_to_the_border_of_its_cell_as_it_was() -> None:
    scheme = Scheme(4, True, None, "float16")
    weight = torch.tensor([[0.1, -0.3, 0.72, 5.0]])
    anchor = integer_weight(
        torch.tensor([[8, 8, 9, 10]], dtype=torch.uint8), torch.ones(1, 1, dtype=torch.float16), None, scheme
    )
    learner = LinearLearner(weight, scheme, LearnedConfig(), generator(0), anchor)
    torch.testing.assert_close(learner.base, torch.tensor([[0.1, -0.3, 0.72, 2.49]]))
    assert torch.equal(weight, torch.tensor([[0.1, -0.3, 0.72, 5.0]])), "the checkpoint's weight is not changed"


# -- soft rounding and bounds ------------------------------------------------------------------------------------------


def test_soft_rounding_starts_at_the_weight_itself() -> None:
    weight = normal(6, 16)
    learner = LinearLearner(weight, Scheme(4, False, 8), LearnedConfig(rounding="soft", clip="off"), generator(0))
    codes, error = learner.fold().codes, (learner.weight().detach() - weight).abs()
    between = (codes > 0) & (codes < 15)
    assert between.sum() > 60
    assert error[between].max() < 1e-6
    assert error.max() < 0.5 * 6 / 15, "the ends of a range: a zero that is a whole number moves it"
    value = torch.tensor([-50.0, 0.0, 50.0])
    torch.testing.assert_close(soft_rounding(value), torch.tensor([0.0, 0.5, 1.0]))


def test_the_regularizer_is_small_where_choices_are_made() -> None:
    learner = LinearLearner(normal(4, 8), Scheme(4, False, 8), LearnedConfig(rounding="soft", clip="off"), generator(0))
    variable = learner.parameters["soft"]

    def found(value: float, power: float) -> float:
        variable.data.fill_(value)
        term = learner.regularizer(power)
        assert term is not None
        return term.item()

    chosen = 1.2 / (1 + math.exp(-0.4)) - 0.1
    assert found(50.0, 2.0) == 0
    assert found(0.0, 2.0) == 32
    assert found(0.4, 3.0) == pytest.approx(32 * (1 - (2 * chosen - 1) ** 3), rel=1e-5)
    assert LinearLearner(normal(4, 8), Scheme(4), LearnedConfig(), generator(0)).regularizer(2.0) is None


def test_bounded_factors_stay_inside() -> None:
    config = LearnedConfig(clip="bounded", lora_rank=0)
    learner = LinearLearner(normal(4, 8), Scheme(4, False, 8), config, generator(0))
    learner.parameters["clip_low"].data.fill_(1.5)
    learner.parameters["clip_high"].data.fill_(-0.5)
    learner.keep_inside()
    assert (learner.parameters["clip_low"] == 1).all()
    assert (learner.parameters["clip_high"] == 0).all()
    smooth = LinearLearner(normal(4, 8), Scheme(4, False, 8), LearnedConfig(), generator(0))
    smooth.parameters["clip_low"].data.fill_(9.0)
    smooth.keep_inside()
    assert (smooth.parameters["clip_low"] == 9).all(), "a sigmoid bounds itself"

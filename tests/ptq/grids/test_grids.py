"""Grids against brute force, scales against what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import NumericalError, UsageError
from ptq.grids import Grid, ScaledGrid, fit_scales, uniform_grid
from ptq.grids.scale_search import stored_scale
from ptq.scheme import Scheme

E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(weight: torch.Tensor, scheme: Scheme, search: str = "pnorm") -> ScaledGrid:
    importance = random(weight.shape[1], seed=5).abs()
    scale, zero = fit_scales(weight, scheme, search, importance)  # type: ignore[arg-type]
    centre = torch.full(scale.shape, 2.0 ** (scheme.bits - 1))
    return ScaledGrid(
        uniform_grid(scheme.bits),
        scale.float(),
        centre if zero is None else zero.float(),
        scheme.group_index(weight.shape[1]),
    )


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=16, unique=True), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_nearest_is_nearest_on_any_table(levels: list[float], seed: int) -> None:
    grid = Grid(torch.tensor(sorted(levels)))
    x = 40 * random(64, seed=seed)
    best = (x[:, None] - grid.levels).abs().amin(1)
    assert torch.equal((x - grid.values(grid.nearest(x))).abs(), best)


@given(st.integers(1, 15), st.integers(0, 10**6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_nearest_several_are_the_nearest(count: int, seed: int, codebook: bool) -> None:
    grid = Grid(E2M1) if codebook else Grid(torch.arange(15.0), uniform=True)
    x = 5 * random(32, seed=seed) + (0 if codebook else 7)
    found = (x[:, None] - grid.values(grid.nearest_several(x, count))).abs().sort(1).values
    wanted = (x[:, None] - grid.levels).abs().sort(1).values[:, :count]
    torch.testing.assert_close(found, wanted)


def test_a_grid_refuses_levels_that_do_not_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Grid(torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 24])
def test_search_beats_min_max_in_its_own_norm(symmetric: bool, bits: int, group_size: int | None) -> None:
    weight = random(24, 64)  # 64 is no multiple of 24: the last group is ragged
    scheme = Scheme(bits, symmetric, group_size)

    def error(search: str) -> torch.Tensor:
        grid = bound(weight, scheme, search)
        loss = (weight - grid.dequantize(grid.round(weight))).abs() ** 2.4
        return torch.zeros(24, scheme.groups(64)).index_add_(1, grid.group, loss)

    assert bool((error("pnorm") <= error("minmax") * (1 + 1e-5)).all())


def test_hessian_search_beats_the_p_norm_in_the_weighted_error() -> None:
    weight, importance = random(32, 64), random(64, seed=5).abs() ** 3
    scheme = Scheme(3, True, 32)

    def error(search: str) -> float:
        scale, _ = fit_scales(weight, scheme, search, importance)  # type: ignore[arg-type]
        grid = ScaledGrid(uniform_grid(3), scale.float(), torch.full(scale.shape, 4.0), scheme.group_index(64))
        return float(((weight - grid.dequantize(grid.round(weight))) ** 2 * importance).sum())

    assert error("hessian") < error("pnorm")
    with pytest.raises(ValueError, match="diagonal"):
        fit_scales(weight, scheme, "hessian")


def test_min_max_covers_the_range_and_zero_is_exact() -> None:
    weight = random(8, 32)
    grid = bound(weight, Scheme(4, False, 32), "minmax")
    steps = (weight - grid.dequantize(grid.round(weight))).abs() / grid.scale
    assert float(steps.max()) <= 1.0  # half a step of rounding and at most half of the zero point's
    values = grid.dequantize(grid.grid.nearest(grid.zero.expand(8, 32)))
    assert torch.equal(values, torch.zeros(8, 32))


def test_mirrored_scales_put_the_extra_level_where_it_is_needed() -> None:
    weight = torch.tensor([[3.0, 1.0, -1.0, 4.0]])  # 4 s with s = 1 needs the side that has four levels
    scale, _ = fit_scales(weight, Scheme(3, True, None))
    assert float(scale) < 0
    grid = ScaledGrid(uniform_grid(3), scale.float(), torch.tensor([[4.0]]), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(grid.dequantize(grid.round(weight)), weight, rtol=0, atol=0.06)


def test_rows_of_zeros_and_tiny_weights_get_a_scale() -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-12), random(16)])
    for symmetric in (True, False):
        grid = bound(weight, Scheme(3, symmetric, 16))
        values = grid.dequantize(grid.round(weight))
        assert torch.equal(values[:2], torch.zeros(2, 16))


def test_a_scale_beyond_float16_is_refused_with_the_way_out() -> None:
    with pytest.raises(NumericalError, match="bfloat16"):
        fit_scales(1e9 * random(2, 16), Scheme(3, True, 16, "float16"))
    scale, _ = fit_scales(1e9 * random(2, 16), Scheme(3, True, 16, "bfloat16"))
    assert bool(torch.isfinite(scale.float()).all())


def test_stored_scales_are_what_the_dtype_holds() -> None:
    scale = stored_scale(torch.tensor([0.1, 1e-30, 3.3]), torch.float16)
    assert torch.equal(scale, scale.half().float())
    assert float(scale[1]) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"group_size": 0}, "group_size"),
        ({"scale_dtype": "f8"}, "f8"),
    ],
)
def test_a_scheme_refuses_nonsense(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scheme(**wrong)  # type: ignore[arg-type]


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_snapping_is_nearest_and_its_codes_come_back(seed: int, codebook: bool) -> None:
    grid = Grid(E2M1) if codebook else uniform_grid(4)
    x = 9 * random(64, seed=seed)
    assert torch.equal(grid.snap(x), grid.values(grid.nearest(x)))
    assert torch.equal(grid.codes_of(grid.snap(x)), grid.nearest(x))


@pytest.mark.parametrize(
    ("bits", "symmetric", "slack"),
    [(2, True, 1.01), (3, True, 1.01), (4, True, 1.01), (8, True, 1.05), (3, False, 1.01), (4, False, 1.01)],
)
def test_the_search_is_as_good_as_trying_every_ratio(bits: int, symmetric: bool, slack: float) -> None:
    """Slow: 281 ratios between 0.3 and 1, measured exactly, both signs where the search tries them. At 8 bits the error
    jumps from ratio to ratio, and the more are tried the smaller is the smallest."""
    weight, scheme = random(16, 128, seed=4), Scheme(bits, symmetric, 64)
    low = weight.view(16, 2, 64).amin(-1).clamp(max=0.0)
    high = weight.view(16, 2, 64).amax(-1).clamp(min=0.0)
    steps = 2**bits - 1
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    zero = torch.full_like(span, 2.0 ** (bits - 1)) if symmetric else (-low / span * steps).round()

    def error(scale: torch.Tensor) -> torch.Tensor:
        grid = ScaledGrid(uniform_grid(bits), scale, zero, scheme.group_index(128))
        return (weight - grid.dequantize(grid.round(weight))).abs().pow(2.4).view(16, 2, 64).sum(-1)

    signs = (1, -1) if symmetric and bits <= 4 else (1,)
    trials = [
        stored_scale(span / steps * ratio, torch.float16) * sign
        for ratio in torch.linspace(0.3, 1.0, 281)
        for sign in signs
    ]
    best = torch.stack([error(trial) for trial in trials]).amin(0)
    scale, _ = fit_scales(weight, scheme)
    found = error(scale.float())
    assert float(found.sum()) <= slack * float(best.sum())
    assert bool((found <= 5 * slack * best - 4 * best).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_not_finite_is_refused(symmetric: bool) -> None:
    weight = random(3, 32)
    weight[1, 5] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        fit_scales(weight, Scheme(3, symmetric, 16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [1.4e-45, 7e-45, 1e-43, 1e-40])
def test_subnormal_weights_have_scales(value: float, bits: int, symmetric: bool) -> None:
    weight = torch.full((2, 8), value)
    weight[1] = 0.0
    scale, _ = fit_scales(weight, Scheme(bits=bits, symmetric=symmetric, group_size=4))
    assert bool(torch.isfinite(scale.float()).all())

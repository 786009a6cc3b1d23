"""Scales refitted after rounding: against least squares written out, and what must hold for every number format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq import Scheme
from ptq.errors import UsageError
from ptq.methods import METHODS, make_config
from ptq.methods.refinement import refine
from ptq.number_formats import FORMATS
from ptq.solvers import Factor, factorize, quadratic, refit_scales, successive_rounding

ROWS, WIDTH = 12, 256


def problem() -> tuple[Tensor, Factor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator) / WIDTH**0.5
    inputs = torch.randn(1024, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return weight, factorize(inputs.T @ inputs)


def loss(difference: Tensor, factor: Factor) -> Tensor:
    return quadratic(difference, factor)


def test_one_scale_per_row_is_the_least_squares_of_the_outputs() -> None:
    weight, factor = problem()
    values = (weight * 20).round() / 23
    scale = torch.full((ROWS, 1), 0.5)
    found = refit_scales(weight, values, factor, scale, torch.zeros(WIDTH, dtype=torch.int64))
    place = torch.argsort(factor.order)
    root = torch.linalg.cholesky(factor.hessian[place][:, place].double())
    wanted, given = weight.double() @ root, values.double() @ root
    best = 0.5 * (wanted * given).sum(1) / (given * given).sum(1)
    torch.testing.assert_close(found[:, 0].double(), best, rtol=1e-4, atol=0)


def test_repeated_it_reaches_the_best_scales_of_all_groups_together() -> None:
    weight, factor = problem()
    group = torch.arange(WIDTH) // 64
    values, scale = (weight * 20).round() / 23, torch.ones(ROWS, 4)
    for _ in range(60):
        new = refit_scales(weight, values * scale[:, group], factor, scale, group)
        scale = new
    place = torch.argsort(factor.order)
    root = torch.linalg.cholesky(factor.hessian[place][:, place].double())
    for row in range(ROWS):
        parts = torch.stack([torch.where(group == g, values[row], 0.0) for g in range(4)]).double() @ root
        best = torch.linalg.lstsq(parts.T, weight[row].double() @ root).solution
        torch.testing.assert_close(scale[row].double(), best, rtol=1e-3, atol=1e-4)


def test_groups_of_zeros_and_stored_types_are_kept() -> None:
    weight, factor = problem()
    group = torch.arange(WIDTH) // 128
    values = (weight * 20).round() / 23
    values[:, :128] = 0.0
    found = refit_scales(weight, values, factor, torch.ones(ROWS, 2, dtype=torch.bfloat16), group)
    assert found.dtype == torch.bfloat16
    assert bool((found[:, 0] == 1).all())
    assert bool(torch.isfinite(found.float()).all())
    assert not bool((found[:, 1] == 1).all())


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_of_any_format_gets_worse(name: str) -> None:
    weight, factor = problem()
    scheme = Scheme.of(name) if name != "int" else Scheme(3, False, 64)
    record = scheme.number_format
    if record.columns > 1:
        pytest.skip("codes of several columns have no coordinate descent")
    grid = record.grid(record.fit(weight, scheme), scheme, WIDTH)
    codes, _ = successive_rounding(weight, grid, factor)
    found, new, notes = refine(weight, codes, grid, factor, scheme, refit_passes=2)
    before, after = (loss(weight - g.dequantize(codes), factor) for g in (grid, new))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert torch.equal(found, codes)
    assert {key: value.dtype for key, value in new.params.items()} == {k: v.dtype for k, v in grid.params.items()}
    if record.scale_groups(scheme, WIDTH) is None:
        assert "were not refitted" in notes[0]
        assert torch.equal(after, before)
    else:
        assert not notes
        assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("name", ["int", "itq3s"])
def test_codes_and_scales_in_turn_are_better_than_codes_alone(name: str) -> None:
    weight, factor = problem()
    scheme = Scheme.of(name) if name != "int" else Scheme(3, False, 64)
    grid = scheme.number_format.grid(scheme.number_format.fit(weight, scheme), scheme, WIDTH)
    codes, _ = successive_rounding(weight, grid, factor)
    total = []
    for refits in (0, 1, 4):
        found, new, _ = refine(weight, codes, grid, factor, scheme, cd_passes=1, refit_passes=refits)
        total.append(float(loss(weight - new.dequantize(found), factor).sum()))
    assert total[0] > total[1] > total[2]


@pytest.mark.parametrize("method", ["gptq", "coreq", "itq3s"])
def test_a_negative_number_of_passes_is_refused(method: str) -> None:
    for option in ("cd_passes", "refit_passes"):
        with pytest.raises(UsageError, match=f"{option} is 0 or more, got -1"):
            make_config(METHODS[method], {option: -1})

"""Block scales against compressed-tensors, the numbers of the papers, and plain trying."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from ptq.errors import NumericalError
from ptq.grids.block_scales import (
    EXPONENT_RULES,
    as_blocks,
    e8m0_values,
    fit_e4m3,
    fit_e8m0,
    fit_ratio,
    global_scale,
)
from ptq.grids.floating_point import E2M1, E4M3, FloatFormat


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Blocks of very different sizes."""
    return random(*shape, seed=seed) * torch.exp2(6 * random(*shape[:-1], 1, seed=seed + 1))


def arguments(preset: str) -> QuantizationArgs:
    weights = preset_name_to_scheme(preset, ["Linear"]).weights
    assert weights is not None
    return weights


def error(blocks: torch.Tensor, scale: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    unit = scale[..., None]
    return (number.round(blocks / unit) * unit - blocks).square().sum(-1)


@pytest.mark.parametrize(("preset", "number"), [("MXFP4", E2M1), ("MXFP8", E4M3)])
def test_exponents_are_those_of_compressed_tensors(preset: str, number: FloatFormat) -> None:
    blocks = torch.cat([heavy(16, 32, 32), (1 + torch.arange(512.0) / 512).view(16, 32, 1).expand(-1, -1, 32)])
    blocks = torch.cat(
        [blocks, torch.tensor([1.75, 1.7499999, 1.75 * 2**20, 0.75]).repeat(8)[None, :, None].expand(-1, -1, 32)]
    )
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments(preset))
    assert torch.equal(e8m0_values(fit_e8m0(blocks, number, "minmax")), scale)


@pytest.mark.parametrize(
    ("rule", "low", "high"), [("floor", 4.0, 8.0), ("even", 3.5, 7.0), ("rceil", 3.0000001, 6.0000001)]
)
def test_rules_bring_the_largest_value_into_their_range(rule: str, low: float, high: float) -> None:
    blocks = heavy(32, 32, 32)
    ratio = blocks.abs().amax(-1) / e8m0_values(fit_e8m0(blocks, E2M1, rule))
    assert float(ratio.min()) >= low
    assert float(ratio.max()) < high
    assert float(ratio.max() / ratio.min()) > 1.9  # the range is used


def test_the_exponent_search_is_the_best_of_all_exponents() -> None:
    blocks = heavy(8, 16, 32)
    found = fit_e8m0(blocks, E2M1, "mse")
    largest = error(blocks, e8m0_values(found), E2M1)
    for byte in range(60, 200):
        tried = error(blocks, e8m0_values(torch.full_like(found, byte)), E2M1)
        assert bool((largest <= tried).all())
    for rule in EXPONENT_RULES:
        assert bool((largest <= error(blocks, e8m0_values(fit_e8m0(blocks, E2M1, rule)), E2M1)).all())


def test_relative_errors_are_those_of_the_notes() -> None:
    """Gaussian blocks: .0132 floor, .0126 even, .0133 rceil, .0124 the best of two exponents."""
    blocks = random(256, 64, 32)
    power = blocks.square().sum()
    measured = {
        rule: float(error(blocks, e8m0_values(fit_e8m0(blocks, E2M1, rule)), E2M1).sum() / power)
        for rule in ("floor", "even", "rceil", "mse")
    }
    assert measured == pytest.approx({"floor": 0.0132, "even": 0.0126, "rceil": 0.0133, "mse": 0.0124}, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_scales_are_those_of_compressed_tensors(seed: int) -> None:
    blocks = heavy(16, 24, 16, seed=seed)
    low, high = blocks.amin(-1), blocks.amax(-1)
    tensor_scale = generate_gparam(low.amin(), high.amax())
    assert torch.equal(global_scale(blocks.abs().amax(), "minmax"), tensor_scale)
    scale, _ = calculate_qparams(low, high, arguments("NVFP4"), global_scale=tensor_scale)
    ours = fit_e4m3(blocks, tensor_scale, "minmax").float()
    above = scale != 0.125  # theirs for blocks that are too small; also a real scale, which then is the same
    assert torch.equal(ours[above], scale[above].float())
    assert float(ours.min()) >= 2**-9


def test_four_over_six_on_the_paper_s_example_and_on_gaussians() -> None:
    block = torch.tensor([10.0, 20, 30, 40] + [0.0] * 12).view(1, 1, 16)
    tensor_scale = torch.ones(1)
    six, best = fit_e4m3(block, tensor_scale, "minmax"), fit_e4m3(block, tensor_scale, "four_over_six")
    assert (six.item(), best.item()) == (6.5, 10.0)
    assert error(block, six.float(), E2M1).item() / 4 == pytest.approx(4.33, abs=0.01)
    assert error(block, best.float(), E2M1).item() == 0
    blocks = random(128, 64, 16)
    tensor_scale = global_scale(blocks.abs().amax(), "four_over_six")
    power = blocks.square().sum()

    def relative(search: str) -> float:
        scale = fit_e4m3(blocks, tensor_scale, search).float() / tensor_scale
        return float(error(blocks, scale, E2M1).sum() / power)

    assert relative("minmax") == pytest.approx(0.0090, abs=2e-4)
    assert relative("four_over_six") == pytest.approx(0.0076, abs=2e-4)
    assert relative("mse") < relative("four_over_six")


def test_the_e4m3_search_is_the_best_of_all_scales() -> None:
    blocks = random(4, 8, 16)
    tensor_scale = global_scale(blocks.abs().amax(), "mse")
    found = error(blocks, fit_e4m3(blocks, tensor_scale, "mse").float() / tensor_scale, E2M1)
    for code in range(1, E4M3.magnitudes):
        scale = E4M3.values(torch.tensor(code)).expand(4, 8) / tensor_scale
        assert bool((found <= error(blocks, scale, E2M1) * (1 + 1e-6)).all())


def test_importance_moves_the_scale_to_where_it_matters() -> None:
    block = torch.cat([torch.tensor([6.0]), torch.full((31,), 0.26)]).view(1, 1, 32)
    weights = torch.cat([torch.zeros(1), torch.ones(31)]).view(1, 32)
    plain, weighted = (fit_e8m0(block, E2M1, search, weights) for search in ("mse", "hessian"))
    assert int(weighted) < int(plain)
    with pytest.raises(ValueError, match="Hessian"):
        fit_e8m0(block, E2M1, "hessian")


def test_ratios_never_do_worse_than_the_largest_weight() -> None:
    blocks = random(16, 4, 64)
    for number in (E2M1, FloatFormat(3, 0), FloatFormat(1, 2), E4M3):
        plain, best = (fit_ratio(blocks, number, torch.float16, search).float() for search in ("minmax", "mse"))
        assert bool((error(blocks, best, number) <= error(blocks, plain, number)).all())
        torch.testing.assert_close(plain, blocks.abs().amax(-1) / number.maximum, rtol=1e-3, atol=0)


def test_blocks() -> None:
    weight = torch.arange(35.0).view(5, 7)
    blocks = as_blocks(weight, 2, 4)
    assert blocks.shape == (3, 2, 8)
    assert blocks[0, 0].tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    assert blocks[2, 1].tolist() == [32, 33, 34, 0, 0, 0, 0, 0]
    assert as_blocks(weight, 1, None).shape == (5, 1, 7)
    assert as_blocks(weight, None, None).shape == (1, 1, 35)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_zero_blocks_stay_zero_and_what_is_not_finite_is_refused(wrong: float) -> None:
    blocks = torch.zeros(1, 2, 32)
    for search in ("minmax", "mse", "four_over_six"):
        assert bool((fit_e4m3(blocks[..., :16], global_scale(blocks.amax(), search), search).float() > 0).all())
    assert e8m0_values(fit_e8m0(blocks, E2M1, "mse")).tolist() == [[1.0, 1.0]]
    assert bool((fit_ratio(blocks, E4M3, torch.bfloat16, "mse") > 0).all())
    blocks[0, 1, 3] = wrong
    for fit in (
        lambda: fit_e8m0(blocks, E2M1, "even"),
        lambda: fit_e4m3(blocks, torch.ones(1), "mse"),
        lambda: fit_ratio(blocks, E4M3, torch.float16, "minmax"),
    ):
        with pytest.raises(NumericalError, match="NaN or Inf"):
            fit()


def test_exponents_at_the_ends() -> None:
    blocks = torch.tensor([2.0**127, 2.0**-126, 1e-40]).view(1, 3, 1).expand(1, 3, 32)
    for rule in ("floor", "even", "rceil", "mse"):
        values = e8m0_values(fit_e8m0(blocks, E2M1, rule))
        assert bool(torch.isfinite(values).all() and (values >= 2.0**-126).all())
    assert e8m0_values(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [
        2.0**-127,
        2.0**-126,
        1.0,
        2.0**127,
    ]
    with pytest.raises(ValueError, match="255"):
        e8m0_values(torch.tensor([255], dtype=torch.uint8))

"""Losses for the record against the outputs they stand for."""

from __future__ import annotations

import pytest
import torch

from calib.stats import LinearStatistics, Stat, StatisticsAccumulator
from ptq.methods import find_method
from ptq.pipeline.output_error import layer_losses, losses_flops
from ptq.scheme import Scheme

WIDTH = 150  # more than one block of the symmetric product


def gather(weight: torch.Tensor, inputs: torch.Tensor, full: torch.Tensor | None) -> LinearStatistics:
    needs = {Stat.HESSIAN} | (set() if full is None else {Stat.MISMATCH, Stat.MISMATCH_ENERGY})
    accumulator = StatisticsAccumulator("layer", {"layer": weight}, frozenset(needs))
    accumulator.add(inputs, full)
    return accumulator.finish().of("layer")


@pytest.mark.parametrize("two_streams", [False, True])
def test_losses_are_relative_output_errors(two_streams: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, WIDTH, generator=generator)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / 12 + torch.eye(WIDTH)
    inputs = torch.randn(3, 200, WIDTH, generator=generator) @ mix
    full = inputs + 0.2 * torch.randn(inputs.shape, generator=generator) if two_streams else None
    stats = gather(weight, inputs, full)
    scheme, method = Scheme(3, True, 50), find_method("gptq")
    result = method.quantize(weight, stats, scheme, method.config())
    grid = result.weight.scaled_grid()
    wanted = (inputs if full is None else full).double() @ weight.double().T

    def error(values: torch.Tensor) -> float:
        return float((wanted - inputs.double() @ values.double().T).square().sum() / wanted.square().sum())

    nearest, chosen = layer_losses(weight, result.weight, stats)
    assert nearest == pytest.approx(error(grid.dequantize(grid.round(weight))), rel=1e-4)
    assert chosen == pytest.approx(error(result.weight.dequantize()), rel=1e-4)
    assert chosen is not None
    assert nearest is not None
    assert chosen < nearest


def test_without_statistics_there_are_no_losses_and_without_inputs_none_that_are_not_zero() -> None:
    weight = torch.randn(4, 16)
    rtn = find_method("rtn")
    quantized = rtn.quantize(weight, None, Scheme(3, True, 16), rtn.config()).weight
    assert layer_losses(weight, quantized, None) == (None, None)
    assert layer_losses(weight, quantized, gather(weight, torch.zeros(1, 5, 16), None)) == (0.0, 0.0)


def test_operations_are_at_most_those_of_full_products() -> None:
    for width in (16, WIDTH, 4096):
        one, two = (losses_flops(10, width, mismatch=mismatch) for mismatch in (False, True))
        assert 3 * 10 * width * width < one <= 3 * 2 * 10 * width * width  # more than a triangle, no more than all
        assert two - one == 2 * 10 * width * width

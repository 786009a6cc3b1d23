"""LLM-FP4's search against slow formulas: every token multiplied, every candidate tried, biases as in the paper."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from ptq.activation_formats.static_input import fit_static_input
from ptq.grids.floating_point import FloatFormat, float_format, float_formats
from ptq.solvers.float_search import (
    RATIOS,
    FloatWeight,
    InputMoments,
    output_error,
    search_float,
    search_input,
    search_weight,
    weight_at,
)

FP4 = float_formats(4)


def data(out: int = 6, width: int = 24, tokens: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with channels of very different range."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())
    inputs = torch.randn(tokens, width, generator=generator) * spread
    return torch.randn(out, width, generator=generator) / spread.sqrt(), inputs


def paper_round(x: Tensor, exponent_bits: int, mantissa_bits: int, bias: Tensor) -> Tensor:
    """Equations 1 to 9: a real-valued exponent bias ``b~``, subnormals, no infinity."""
    top = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    clipped = x.clamp(-top, top)
    level = torch.floor(torch.log2(clipped.abs()) + bias).clamp(min=1)
    step = 2.0 ** (level - mantissa_bits - bias)
    return step * torch.round(clipped / step)


def paper_bias(absmax: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Equation 7."""
    return 2**exponent_bits - torch.log2(absmax) + math.log2(2 - 2.0**-mantissa_bits) - 1


def slow_error(weight: Tensor, quantized: Tensor, inputs: Tensor, seen: Tensor) -> Tensor:
    """Squared output error of every row, all tokens multiplied."""
    return ((seen.double() @ quantized.double().T - inputs.double() @ weight.double().T) ** 2).sum(0)


def test_formats_are_those_of_the_paper_the_usual_one_first() -> None:
    assert [number.name for number in float_formats(4)] == ["e2m1", "e1m2", "e3m0"]
    assert {number.name for number in float_formats(8)} == {"e5m2", "e4m3", "e3m4", "e2m5", "e1m6"}
    assert float_formats(8)[0].name == "e4m3"
    assert RATIOS[38] == 1.0
    assert RATIOS[0] == 0.25
    assert 1.3 < RATIOS[-1] < 2**0.5


@pytest.mark.parametrize("number", [*FP4, float_format("e4m3")], ids=lambda number: number.name)
def test_static_inputs_are_the_quantizer_of_the_paper(number: FloatFormat) -> None:
    _, inputs = data()
    e, m = number.exponent_bits, number.mantissa_bits
    absmax, ratio = inputs.abs().amax(0), 0.7
    found = fit_static_input(absmax, number, ratio)
    rho = paper_bias(absmax.max().double(), e, m) - math.log2(ratio)
    shift = torch.round(paper_bias(absmax.double(), e, m) - rho).clamp(0, 2**e - 1)
    assert found.shift is not None
    assert torch.equal(found.shift.double(), shift)
    assert shift.max() > 0
    torch.testing.assert_close(
        found(inputs).double(), paper_round(inputs.double(), e, m, rho + shift), rtol=1e-6, atol=1e-6
    )
    plain = fit_static_input(absmax, number, ratio, shift=False)
    assert plain.shift is None
    torch.testing.assert_close(plain(inputs).double(), paper_round(inputs.double(), e, m, rho), rtol=1e-6, atol=1e-6)


def test_shifts_move_to_the_weight_without_a_change() -> None:
    weight, inputs = data()
    quantizer = fit_static_input(inputs.abs().amax(0), FP4[0])
    assert quantizer.shift is not None
    assert quantizer.shift.max() > 0
    folded = dataclasses.replace(quantizer, folded=True)
    seen = folded(inputs)
    levels = seen / quantizer.scale
    assert torch.equal(levels, FP4[0].round(levels))  # one scale for all channels
    moved = quantizer.folded_weight(weight)
    assert torch.equal(quantizer.unfolded_weight(moved), weight)
    expected = quantizer(inputs).double() @ weight.double().T
    torch.testing.assert_close(seen.double() @ moved.double().T, expected, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_zero_or_not_finite() -> None:
    quantizer = fit_static_input(torch.zeros(3), FP4[0])
    assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert bool(torch.isfinite(quantizer(torch.ones(2, 3))).all())
    odd = fit_static_input(torch.ones(2), FP4[0])(torch.tensor([[float("nan"), float("inf")]]))
    assert math.isnan(odd[0, 0])
    assert odd[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("rounded", [False, True])
def test_gram_matrices_give_the_errors_of_all_tokens(rounded: bool) -> None:
    weight, inputs = data()
    quantizer = fit_static_input(inputs.abs().amax(0), FP4[0]) if rounded else None
    seen = inputs if quantizer is None else quantizer(inputs)
    found = search_weight(weight, InputMoments.of(inputs, quantizer), FP4, torch.float16)
    constant = slow_error(weight, weight, inputs, seen)
    for one in found:
        slow = slow_error(weight, one.round(weight), inputs, seen)
        torch.testing.assert_close(one.error.double() + constant, slow, rtol=1e-4, atol=1e-4)
    totals = [float(one.error.sum()) for one in found]
    assert totals == sorted(totals)


def test_the_search_finds_what_trying_every_ratio_finds() -> None:
    weight, inputs = data(out=64)
    moments = InputMoments.of(inputs, None)
    for one in search_weight(weight, moments, FP4, torch.float16):
        every = [weight_at(weight, one.number, i, torch.float16) for i in range(len(RATIOS))]
        slow = torch.stack([slow_error(weight, other.round(weight), inputs, inputs) for other in every])
        exact = slow_error(weight, one.round(weight), inputs, inputs)
        assert float(exact.sum()) < 1.02 * float(slow.amin(0).sum())
        assert float(exact.sum()) < float(slow[38].sum())  # better than no clipping
        assert torch.equal(one.scale, torch.stack([o.scale for o in every])[one.choice, torch.arange(64)])


def test_rows_are_searched_in_chunks_and_scales_are_stored_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = data(out=10)
    whole = search_weight(weight, InputMoments.of(inputs, None), FP4, torch.bfloat16)[0]
    monkeypatch.setattr("ptq.solvers.float_search._ROW_CHUNK", 3 * 24)
    parts = search_weight(weight, InputMoments.of(inputs, None), FP4, torch.bfloat16)[0]
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.scale, whole.scale.bfloat16().float())


@pytest.mark.parametrize("out", [6, 60])  # by products with all tokens, and by the weight's Gram matrix
def test_the_search_of_inputs_is_that_of_the_slow_formula(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = data(out)
    monkeypatch.setattr("ptq.solvers.float_search._TOKEN_CHUNK", 900)  # several chunks
    quantized = weight_at(weight, FP4[0], 30, torch.float16).round(weight)
    absmax = inputs.abs().amax(0)
    found = search_input(inputs, absmax, weight, quantized, FP4)
    assert [one.error for one in found] == sorted(one.error for one in found)
    for one in found:
        slow = float(slow_error(weight, quantized, inputs, one.quantizer(inputs)).sum())
        assert one.error == pytest.approx(slow, rel=1e-4)
        number = one.quantizer.number
        every = [fit_static_input(absmax, number, ratio) for ratio in RATIOS]
        best = min(float(slow_error(weight, quantized, inputs, other(inputs)).sum()) for other in every)
        assert one.error < 1.05 * best
    energy = float(((inputs @ weight.T) ** 2).sum())
    assert output_error(inputs, found[0].quantizer, weight, quantized) == pytest.approx(found[0].error / energy, 1e-4)


def test_every_round_lowers_the_error_and_shifts_help() -> None:
    weight, inputs = data(out=40)
    absmax = inputs.abs().amax(0)

    def error(rounds: int, shift: bool = True) -> float:
        found = search_float(weight, None, inputs, absmax, FP4, FP4, torch.float16, shift=shift, rounds=rounds)
        assert found.inputs is not None
        return output_error(inputs, found.inputs.quantizer, weight, found.weight.round(weight))

    errors = [error(rounds) for rounds in range(4)]
    assert errors[1] < 0.9 * errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[3] < 0.7 * error(3, shift=False)
    assert error(3, shift=False) < error(0, shift=False)


def test_no_search_is_min_max_and_integers_are_one_of_the_formats() -> None:
    weight, inputs = data()
    e1m2 = (float_format("e1m2"),)
    found = search_float(weight, None, inputs, inputs.abs().amax(0), e1m2, e1m2, torch.float16, shift=False, rounds=0)
    assert found.rounds == 0
    step = (weight.abs().amax(1, keepdim=True) / e1m2[0].maximum).half().float() * 0.5
    torch.testing.assert_close(found.weight.round(weight), (weight / step).round().clamp(-7, 7) * step)
    assert found.inputs is not None
    step = inputs.abs().max() / 7
    torch.testing.assert_close(found.inputs.quantizer(inputs), (inputs / step).round() * step)


def test_weights_alone_need_no_tokens_and_one_round() -> None:
    weight, inputs = data()
    found = search_float(weight, InputMoments.of(inputs, None), None, None, FP4, (), torch.float16)
    assert found.inputs is None
    assert found.rounds == 1
    least: FloatWeight = found.weight
    for number in FP4:
        nearest = weight_at(weight, number, 38, torch.float16).round(weight)
        assert (
            slow_error(weight, least.round(weight), inputs, inputs).sum()
            <= slow_error(weight, nearest, inputs, inputs).sum()
        )

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
from ptq.solvers.float_errors import GramErrors, TokenChoice, TokenErrors, WeightErrors, output_errors
from ptq.solvers.float_screen import screen
from ptq.solvers.float_search import (
    NO_CLIP,
    RATIOS,
    FloatInput,
    InputErrors,
    SearchResult,
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


def evidence(inputs: Tensor, weight: Tensor, rounded: bool) -> tuple[WeightErrors, Tensor]:
    """What the weights' search measures, and the inputs as the weight sees them."""
    if not rounded:
        return GramErrors(inputs.T @ inputs), inputs
    quantizer = fit_static_input(inputs.abs().amax(0), FP4[0])
    chosen = TokenChoice.of(inputs, len(inputs))
    return chosen.errors(quantizer, chosen.outputs(weight)), quantizer(inputs)


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_measured_are_the_errors_of_all_tokens(rounded: bool) -> None:
    weight, inputs = data()
    errors, seen = evidence(inputs, weight, rounded)
    candidates = [weight_at(weight, number, 30, torch.float16).round(weight) for number in FP4]
    found = errors.errors(weight, torch.stack(candidates, 1))
    slow = torch.stack([slow_error(weight, one, inputs, seen) for one in candidates], 1)
    torch.testing.assert_close(found.double(), slow, rtol=1e-4, atol=1e-4)
    few = errors.of_rows(slice(1, None, 2)).errors(weight[1::2], torch.stack(candidates, 1)[1::2])
    torch.testing.assert_close(few.double(), slow[1::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("width", [6, 24])
def test_a_sketch_is_exact_in_its_directions_and_on_the_diagonal(width: int, rounded: bool) -> None:
    """With as many directions as channels nothing is left; with fewer the errors of single columns are exact."""
    weight, inputs = data(width=width)
    errors, seen = evidence(inputs, weight, rounded)
    sketch = errors.sketch()
    error = torch.randn(4, width, generator=torch.Generator().manual_seed(1)) * weight[:4].abs()
    if width > 6:  # of one column each
        error = torch.diag(error[0])[:4] * 10
    drift = seen - inputs
    wanted = ((seen @ error.T + drift @ weight[:4].T) ** 2).sum(0) - ((drift @ weight[:4].T) ** 2).sum(0)
    found = ((sketch.seen @ error.T) ** 2).sum(0) + (sketch.rest * error**2).sum(1)
    if rounded:
        assert sketch.drift is not None
        assert sketch.rest_drift is not None
        pulled = sketch.drift @ weight[:4].T
        found += 2 * ((sketch.seen @ error.T) * pulled).sum(0) + 2 * (sketch.rest_drift * error * weight[:4]).sum(1)
        off_diagonal = seen.T @ drift - sketch.seen.T @ sketch.drift
        off_diagonal -= torch.diag(off_diagonal.diagonal())
        found += 2 * ((error @ off_diagonal) * weight[:4]).sum(1)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_table_gives_the_sums_of_a_sketch(rounded: bool) -> None:
    weight, inputs = data()
    places = torch.randint(256, weight.shape, generator=torch.Generator().manual_seed(2)) + 0.5  # of the table
    weight = places / 256 * weight.sign()
    weight[:, 0] = 1.0
    errors, _ = evidence(inputs, weight, rounded)
    sketch = errors.sketch()
    for number in FP4:
        found = screen(weight, sketch, number, RATIOS)
        for choice in (0, 19, NO_CLIP, 47):
            error = weight_at(weight, number, choice, torch.float32).round(weight) - weight
            moved = error @ sketch.seen.T
            slow = (sketch.rest * error**2).sum(1)
            if sketch.drift is not None and sketch.rest_drift is not None:
                moved = moved + weight @ sketch.drift.T
                slow += 2 * (sketch.rest_drift * error * weight).sum(1)
            slow += (moved**2).sum(1)
            torch.testing.assert_close(found[:, choice], slow, rtol=0.02, atol=0.02 * float(slow.abs().mean()))


def exhaustive(weight: Tensor, inputs: Tensor, seen: Tensor, number: FloatFormat) -> Tensor:
    """The least error of every row over all ratios, ``[out]``, all tokens multiplied."""
    every = [weight_at(weight, number, i, torch.float16).round(weight) for i in range(len(RATIOS))]
    return torch.stack([slow_error(weight, one, inputs, seen) for one in every]).amin(0)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("out", [64, 300])  # formats compared on all rows, and on some
def test_the_search_finds_what_trying_every_ratio_and_format_finds(out: int, rounded: bool) -> None:
    weight, inputs = data(out=out)
    errors, seen = evidence(inputs, weight, rounded)
    found = search_weight(weight, errors, FP4, torch.float16)[0]
    exact = slow_error(weight, found.round(weight), inputs, seen)
    torch.testing.assert_close(found.error.double(), exact, rtol=1e-3, atol=1e-3)
    best = min(float(exhaustive(weight, inputs, seen, number).sum()) for number in FP4)
    assert float(exact.sum()) < 1.03 * best
    unclipped = weight_at(weight, found.number, NO_CLIP, torch.float16).round(weight)
    assert float(exact.sum()) < float(slow_error(weight, unclipped, inputs, seen).sum())
    assert torch.equal(found.scale, weight_at(weight, found.number, found.choice, torch.float16).scale)


def test_rows_are_searched_in_chunks_and_scales_are_stored_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = data(out=10)
    errors = GramErrors(inputs.T @ inputs)
    whole = search_weight(weight, errors, FP4, torch.bfloat16)[0]
    monkeypatch.setattr("ptq.solvers.float_search._CHUNK", 3 * 3 * 24)
    monkeypatch.setattr("ptq.solvers.float_screen._ROW_CHUNK", 4 * 24)
    parts = search_weight(weight, errors, FP4, torch.bfloat16)[0]
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.scale, whole.scale.bfloat16().float())


def test_nothing_is_clipped_where_it_makes_no_difference() -> None:
    weight, _ = data()
    none = TokenErrors(torch.empty(0, 24), torch.empty(0, 24), torch.empty(0, 6))
    for errors in (GramErrors(torch.zeros(24, 24)), none):
        assert set(search_weight(weight, errors, FP4, torch.float16)[0].choice.tolist()) == {NO_CLIP}


def test_chosen_tokens_are_the_largest_and_some_of_the_others() -> None:
    _, inputs = data(tokens=200)
    inputs[37] *= 1000
    assert torch.equal(TokenChoice.of(inputs, 200).tokens, inputs)
    found = TokenChoice.of(inputs.bfloat16(), 40)
    assert found.tokens.shape == (40, 24)
    assert torch.equal(found.tokens[0], inputs[37].bfloat16().float())
    assert found.weight[:10].unique().tolist() == [1.0]
    assert float(found.weight.square().sum()) == pytest.approx(200)  # they stand for all
    assert len(found.tokens.unique(dim=0)) == 40


@pytest.mark.parametrize("out", [6, 300])
def test_the_search_of_inputs_is_that_of_the_slow_formula(out: int) -> None:
    weight, inputs = data(out)
    quantized = weight_at(weight, FP4[0], 30, torch.float16).round(weight)
    absmax = inputs.abs().amax(0)
    chosen = TokenChoice.of(inputs, len(inputs))
    start = [FloatInput(fit_static_input(absmax, number, RATIOS[35]), 35, 0.0) for number in FP4]
    measure = InputErrors(chosen, chosen.outputs(weight), absmax, quantized, shift=True)
    found = search_input(measure, start)
    assert [one.error for one in found] == sorted(one.error for one in found)
    for one in found:
        slow = float(slow_error(weight, quantized, inputs, one.quantizer(inputs)).sum())
        assert one.error == pytest.approx(slow, rel=1e-4)
    energy = float(((inputs @ weight.T) ** 2).sum())
    (relative,) = output_errors(inputs, weight, [(found[0].quantizer, quantized)])
    assert relative == pytest.approx(found[0].error / energy, 1e-4)


def searched(weight: Tensor, inputs: Tensor, **options: bool | int) -> tuple[SearchResult, float]:
    found = search_float(weight, inputs, inputs.abs().amax(0), FP4, FP4, torch.float16, **options)  # type: ignore[arg-type]
    assert found.inputs is not None
    return found, output_errors(inputs, weight, [(found.inputs.quantizer, found.weight.round(weight))])[0]


def alternated(weight: Tensor, inputs: Tensor, rounds: int) -> float:
    """The error that is left by trying every format and ratio in every round, all tokens multiplied."""
    absmax = inputs.abs().amax(0)
    quantizers = [fit_static_input(absmax, number, ratio) for number in FP4 for ratio in RATIOS]
    current, error = fit_static_input(absmax, FP4[0]), math.inf
    for _ in range(rounds):
        rounded = torch.empty(0)
        least = math.inf
        for number in FP4:
            every = [weight_at(weight, number, i, torch.float16).round(weight) for i in range(len(RATIOS))]
            errors = torch.stack([slow_error(weight, one, inputs, current(inputs)) for one in every])
            if float(errors.amin(0).sum()) < least:
                least = float(errors.amin(0).sum())
                rounded = torch.stack(every)[errors.argmin(0), torch.arange(len(weight))]
        losses = [float(slow_error(weight, rounded, inputs, one(inputs)).sum()) for one in quantizers]
        error = min(losses)
        current = quantizers[losses.index(error)]
    return error / float(((inputs.double() @ weight.double().T) ** 2).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_few_measurements_find_what_all_of_them_find(seed: int) -> None:
    weight, inputs = data(out=130, width=24, tokens=560, seed=seed)
    _, error = searched(weight, inputs)
    assert error < 1.05 * alternated(weight, inputs, 3)


def test_rounds_lower_the_error_and_shifts_help() -> None:
    weight, inputs = data(out=40)
    errors = [searched(weight, inputs, rounds=rounds)[1] for rounds in range(4)]
    assert errors[1] < 0.9 * errors[0]
    assert all(after <= before * 1.02 for before, after in itertools.pairwise(errors))
    unshifted = [searched(weight, inputs, shift=False, rounds=rounds)[1] for rounds in (0, 3)]
    assert errors[3] < 0.7 * unshifted[1] < 0.7 * unshifted[0]
    many = searched(weight, inputs, rounds=100)[0]
    assert 2 <= many.rounds < 20  # it stops where inputs stay as they are


def test_no_search_is_min_max_and_integers_are_one_of_the_formats() -> None:
    weight, inputs = data()
    e1m2 = (float_format("e1m2"),)
    found = search_float(weight, inputs, inputs.abs().amax(0), e1m2, e1m2, torch.float16, shift=False, rounds=0)
    assert found.rounds == 0
    step = (weight.abs().amax(1, keepdim=True) / e1m2[0].maximum).half().float() * 0.5
    torch.testing.assert_close(found.weight.round(weight), (weight / step).round().clamp(-7, 7) * step)
    assert found.inputs is not None
    step = inputs.abs().max() / 7
    torch.testing.assert_close(found.inputs.quantizer(inputs), (inputs / step).round() * step)

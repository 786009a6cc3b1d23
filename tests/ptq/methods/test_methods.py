"""Methods on tensors: coefficients against geometry, GPTAQ against its column formula, options against nonsense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat, StatisticsAccumulator
from ptq.errors import UsageError
from ptq.grids import Grid, ScaledGrid, uniform_grid
from ptq.methods import METHODS, LayerMethod, find_method, make_config, parse_options
from ptq.methods.layerwise.coreq import COEFFICIENTS
from ptq.methods.layerwise.gptaq import drift_matrix
from ptq.pipeline.output_error import layer_losses
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme
from ptq.solvers import factorize, successive_rounding

SCHEME = Scheme(3, True, 16)
LAYERWISE = [name for name, method in METHODS.items() if isinstance(method, LayerMethod)]


def data(seed: int = 0, mismatch: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [24, 40], inputs X~ and X [6, 50, 40]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 40, generator=generator)
    inputs = torch.randn(6, 50, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    drawn = torch.randn(6, 50, 40, generator=generator) + inputs @ torch.randn(40, 40, generator=generator) / 40
    return weight, inputs, inputs + mismatch * drawn


def gather(weight: Tensor, inputs: Tensor, full: Tensor, needs: frozenset[Stat] = frozenset(Stat)) -> LinearStatistics:
    accumulator = StatisticsAccumulator("layer", {"layer": weight}, needs)
    for part in range(0, len(inputs), 2):
        accumulator.add(inputs[part : part + 2], full[part : part + 2])
    return accumulator.finish().of("layer")


def run(name: str, weight: Tensor, stats: LinearStatistics | None, **options: Any) -> Any:
    method = find_method(name)
    return method.quantize(weight, stats, SCHEME, make_config(method, options))


def test_alpha_is_the_share_of_the_mismatch_that_inputs_can_reach() -> None:
    weight, inputs, full = data()
    rows, difference = inputs.reshape(-1, 40).double(), (full - inputs).reshape(-1, 40).double()
    mismatch = difference @ weight.double().T
    reach = rows @ torch.linalg.lstsq(rows, mismatch).solution  # projection on the span of the inputs
    expected = float((reach**2).sum() / (mismatch**2).sum())
    result = run("coreq", weight, gather(weight, inputs, full), damping=0.0)
    assert result.figures["alpha"] == pytest.approx(expected, rel=1e-3)
    assert result.figures["r2"] == result.figures["alpha"]
    damped = run("coreq", weight, gather(weight, inputs, full), damping=0.01)
    assert 0 < damped.figures["alpha"] < expected


def test_damping_by_tokens_is_channels_per_token_where_that_is_more() -> None:
    weight, inputs, full = data()
    stats, tokens = gather(weight, inputs, full), inputs.numel() / 40
    adapted = run("coreq", weight, stats, token_damping=True)
    assert adapted.figures["damping"] == pytest.approx(40 / tokens)
    same = run("coreq", weight, stats, damping=40 / tokens)
    assert torch.equal(adapted.weight.codes, same.weight.codes)
    assert run("coreq", weight, stats, damping=0.9, token_damping=True).figures["damping"] == 0.9
    few = run("coreq", weight, gather(weight, inputs[:1], full[:1]), token_damping=True)
    assert few.figures["damping"] == min(1.0, 40 / inputs[:1, :, 0].numel())


def test_equal_streams_give_alpha_zero_and_the_codes_of_gptq() -> None:
    weight, inputs, _ = data()
    stats = gather(weight, inputs, inputs)
    gptq = run("gptq", weight, stats)
    for coefficient in COEFFICIENTS:
        result = run("coreq", weight, stats, coefficient=coefficient)
        assert torch.equal(result.weight.codes, gptq.weight.codes)
        assert result.figures["alpha"] == 0 or coefficient == "fixed"
    assert torch.equal(run("gptaq", weight, stats).weight.codes, gptq.weight.codes)


def test_alpha_zero_is_gptq_on_streams_that_differ() -> None:
    weight, inputs, full = data()
    stats = gather(weight, inputs, full)
    zero = run("coreq", weight, stats, coefficient="fixed", alpha=0.0)
    assert torch.equal(zero.weight.codes, run("gptq", weight, stats).weight.codes)


def test_row_coefficients_are_the_rows_of_the_geometry() -> None:
    from ptq.methods.common import group_factor
    from ptq.methods.layerwise.coreq import coefficient

    weight, inputs, full = data()
    stats = gather(weight, inputs, full)
    config = make_config(find_method("coreq"), {"coefficient": "row", "damping": 0.0})
    pull = weight @ stats.mismatch
    factor, _ = group_factor(stats, 0.0, "descending")
    alpha, _ = coefficient(weight, factor.solve(pull), pull, stats, config)
    rows = inputs.reshape(-1, 40).double()
    mismatch = (full - inputs).reshape(-1, 40).double() @ weight.double().T
    reach = rows @ torch.linalg.lstsq(rows, mismatch).solution
    torch.testing.assert_close(alpha[:, 0].double(), (reach**2).sum(0) / (mismatch**2).sum(0), rtol=1e-3, atol=1e-4)


def test_cross_validation_trusts_what_holds_and_not_what_is_noise() -> None:
    weight, inputs, _ = data()
    generator = torch.Generator().manual_seed(9)
    linear = inputs + inputs @ torch.randn(40, 40, generator=generator) / 20  # X is a linear map of X~: all reachable
    noise = inputs + torch.randn(inputs.shape, generator=generator)
    assert run("coreq", weight, gather(weight, inputs, linear), coefficient="cv").figures["alpha"] > 0.95
    assert run("coreq", weight, gather(weight, inputs, noise), coefficient="cv").figures["alpha"] < 0.3
    shrunken = run("coreq", weight, gather(weight, inputs, linear), coefficient="js").figures["alpha"]
    assert 0.9 < shrunken <= 1.0


def test_correction_lowers_the_output_error_that_it_aims_at() -> None:
    weight, inputs, full = data(mismatch=1.0)
    stats = gather(weight, inputs, full)

    def error(name: str) -> float:
        q = run(name, weight, stats).weight.dequantize()
        return float(((full @ weight.T - inputs @ q.T) ** 2).sum() / ((full @ weight.T) ** 2).sum())

    assert error("coreq") < error("gptaq") < error("gptq") < error("rtn")
    for name in ("coreq", "gptaq", "gptq"):
        nearest, chosen = layer_losses(weight, run(name, weight, stats).weight, stats)
        assert chosen == pytest.approx(error(name), rel=1e-3)
        assert nearest is not None
        assert chosen < nearest or name == "gptq"


def test_gptaq_is_its_column_formula() -> None:
    """Slow: err = (w_i - q_i) / V_ii, w_k += -err V_ik + w_i P_ik, one column at a time with V of H^-1 = V^T V."""
    weight, inputs, full = data()
    stats = gather(weight, inputs, full)
    factor = factorize(stats.hessian)
    drift = drift_matrix(factor, stats.mismatch, 0.7)
    result = run("gptaq", weight, stats, strength=0.7, scales="minmax")
    grid: ScaledGrid = result.weight.scaled_grid()
    inverse = torch.linalg.inv(factor.hessian.double())
    v = torch.linalg.cholesky(inverse, upper=True)
    ordered = stats.mismatch.double()[factor.order][:, factor.order]
    slow_drift = 0.7 * (torch.triu(ordered @ v.T, 1) @ v).triu(1)
    torch.testing.assert_close(drift.double(), slow_drift, rtol=1e-3, atol=1e-4)
    w = weight.double()[:, factor.order].clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    permuted = grid.permuted(factor.order)
    for i in range(w.shape[1]):
        scale, zero = permuted.scale_of(i, i + 1)
        codes[:, i : i + 1] = permuted.grid.nearest(w[:, i : i + 1].float() / scale + zero)
        q = ((codes[:, i : i + 1].float() - zero) * scale).double()
        current = w[:, i : i + 1].clone()
        w[:, i + 1 :] += -(current - q) / v[i, i] * v[i, i + 1 :] + current * slow_drift[i, i + 1 :]
    assert torch.equal(result.weight.codes[:, factor.order], codes)


def test_dynamic_groups_fit_scales_to_compensated_columns() -> None:
    weight, inputs, full = data()
    stats = gather(weight, inputs, full)
    result = run("gptq", weight, stats, act_order=False, static_groups=False)
    grid = result.weight.scaled_grid()
    codes, _ = successive_rounding(weight, grid, factorize(stats.hessian, 0.01, "natural"))
    assert torch.equal(codes, result.weight.codes)  # the scales it ended with reproduce it
    static = run("gptq", weight, stats, act_order=False)
    assert torch.equal(
        result.weight.params["scale"][:, 0], static.weight.params["scale"][:, 0]
    )  # nothing precedes the first group
    assert not torch.equal(result.weight.params["scale"][:, 1:], static.weight.params["scale"][:, 1:])


@pytest.mark.parametrize("name", [name for name in LAYERWISE if name not in ("rtn", "itq3s")])
def test_methods_with_data_say_so_when_there_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="calibration"):
        run(name, torch.randn(4, 32), None)


@pytest.mark.parametrize("name", LAYERWISE)
def test_statistics_that_are_named_are_enough(name: str) -> None:
    weight, inputs, full = data()
    method = find_method(name)
    needs = method.needs(method.config())
    assert method.summary
    stats = gather(weight, inputs, full, needs) if needs else None
    scheme = Scheme.of(**method.defaults) if method.defaults else SCHEME
    result = method.quantize(weight, stats, scheme, method.config())
    assert result.weight.shape == (24, 40)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coreq", {"beem": 4}, "'beam'"),
        ("coreq", {"beam": 0}, "1 to 256"),
        ("coreq", {"coefficient": "cor"}, "'corr'"),
        ("coreq", {"alpha": 2.0}, "0 to 1"),
        ("coreq", {"cd_passes": -1}, "0 or more"),
        ("coreq", {"order": "random"}, "order"),
        ("gptq", {"damping": -1.0}, "0 to 1"),
        ("gptq", {"static_groups": False}, "act_order"),
        ("gptaq", {"strength": 3.0}, "0 to 1"),
        ("rtn", {"scales": "pnrom"}, "'pnorm'"),
    ],
)
def test_options_out_of_bounds_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(find_method(name), options)


def test_options_are_read_as_the_type_of_their_default() -> None:
    coreq = find_method("coreq")
    assert parse_options(coreq, {"beam": "4", "alpha": "0.25", "order": "natural"}) == {
        "beam": 4,
        "alpha": 0.25,
        "order": "natural",
    }
    assert parse_options(find_method("gptq"), {"act_order": "false"}) == {"act_order": False}
    for key, text in (("beam", "four"), ("alpha", "x"), ("nonsense", "1")):
        with pytest.raises(UsageError, match=key):
            parse_options(coreq, {key: text})
    with pytest.raises(UsageError, match="'coreq'"):
        find_method("coreg")


def test_operations_of_what_linears_share_are_counted_once() -> None:
    weight, inputs, full = data()
    accumulator = StatisticsAccumulator("layer", {"q": weight, "k": weight}, frozenset(Stat))
    accumulator.add(inputs, full)
    group = accumulator.finish()
    for name in ("gptq", "gptaq", "coreq"):
        method = find_method(name)
        group._memo.clear()
        first, second = (method.quantize(weight, group.of(n), SCHEME, method.config()).flops for n in ("q", "k"))
        assert first > second > 0
        assert name == "gptaq" or first - second == 40**3 // 3
    assert run("rtn", weight, None).flops == 0


E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize("grid", [Grid(torch.tensor(E2M1)), uniform_grid(3)], ids=["E2M1", "3 bits"])
def test_codes_of_another_grid_are_never_stored_as_integers_of_the_scheme(grid: Grid) -> None:
    scale, zero = torch.ones(2, 1), torch.full((2, 1), 4.0)
    bound = ScaledGrid(grid, scale, zero, torch.zeros(8, dtype=torch.int64), {"scale": scale.half()})
    with pytest.raises(ValueError, match="cannot be stored as int4 sym per channel"):
        QuantizedWeight.from_grid(
            bound.round(torch.randn(2, 8)), bound, Scheme(4, group_size=None, scale_dtype="float16")
        )

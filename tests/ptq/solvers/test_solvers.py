"""Solvers against slow formulas written independently: plain loops, explicit inverses, exhaustive search."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from ptq.errors import NumericalError, UsageError
from ptq.grids import Grid, ScaledGrid, fit_scales, uniform_grid
from ptq.scheme import Scheme
from ptq.solvers import (
    ORDERS,
    beam_flops,
    beam_search,
    column_order,
    coordinate_descent,
    factorize,
    factorize_flops,
    quadratic,
    solve_flops,
    successive_rounding,
    sweep_flops,
)


def problem(rows: int, width: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight and a correlated Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens or 4 * width, width, generator=generator) @ mix
    return weight, inputs.T @ inputs


def uniform(weight: Tensor, bits: int = 3, group_size: int | None = 16) -> ScaledGrid:
    scheme = Scheme(bits, False, group_size)
    scale, zero = fit_scales(weight, scheme)
    assert zero is not None
    return ScaledGrid(uniform_grid(bits), scale.float(), zero.float(), scheme.group_index(weight.shape[1]))


def codebook(weight: Tensor) -> ScaledGrid:
    """Unequal steps: no solver may assume a step."""
    levels = torch.tensor([-3.0, -1.7, -0.9, -0.3, 0.25, 0.8, 1.5, 2.6])
    scale = weight.abs().amax(1, keepdim=True) / 3
    return ScaledGrid(Grid(levels), scale, torch.zeros_like(scale), torch.zeros(weight.shape[1], dtype=torch.int64))


GRIDS = {"uniform": uniform, "codebook": codebook}


def nearest(grid: ScaledGrid, value: float, row: int, column: int) -> float:
    """Slow: all levels of one cell, the nearest wins."""
    group = int(grid.group[column])
    levels = (grid.grid.levels - grid.zero[row, group]) * grid.scale[row, group]
    return float(levels[(levels - value).abs().argmin()])


def gptq_by_inverse(weight: Tensor, grid: ScaledGrid, hessian: Tensor, order: Tensor) -> Tensor:
    """Textbook GPTQ, one row and one column at a time, with the explicit inverse of what is left of the Hessian."""
    result = torch.empty_like(weight)
    for row in range(len(weight)):
        w, left = weight[row].double().clone(), order.tolist()
        inverse = torch.linalg.inv(hessian.double()[order][:, order])
        while left:
            j = left[0]
            q = nearest(grid, float(w[j]), row, j)
            result[row, j] = q
            error = (w[j] - q) / inverse[0, 0]
            w[left] -= error * inverse[0]
            inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
            left = left[1:]
    return result


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("order", ORDERS)
def test_greedy_is_gptq_with_fixed_scales(make: object, order: str) -> None:
    weight, hessian = problem(6, 40)
    grid = make(weight)  # type: ignore[operator]
    factor = factorize(hessian, 0.01, order)  # type: ignore[arg-type]
    codes, _ = successive_rounding(weight, grid, factor, block=16)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    slow = gptq_by_inverse(weight, grid, damped, factor.order)
    torch.testing.assert_close(grid.dequantize(codes), slow)


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_the_block_size_does_not_change_the_result(block: int) -> None:
    weight, hessian = problem(8, 50)
    grid, factor = uniform(weight), factorize(hessian)
    whole, _ = successive_rounding(weight, grid, factor, block=50)
    parts, _ = successive_rounding(weight, grid, factor, block=block)
    assert torch.equal(whole, parts)


def test_objective_identity_of_the_corrected_target() -> None:
    """||W X~ + a M - Q X~||^2 = ||(W + a B - Q) X~||^2 + a^2 ||U||^2, M = W dX, B = W D H^-1, U out of reach."""
    generator = torch.Generator().manual_seed(1)
    inputs, other = (torch.randn(12, 90, generator=generator).double() for _ in range(2))
    weight = torch.randn(5, 12, generator=generator).double()
    quantized = weight.mul(2).round().div(2)
    difference = other - inputs
    shift = weight @ (difference @ inputs.T) @ torch.linalg.inv(inputs @ inputs.T)
    mismatch = weight @ difference
    unreachable = mismatch - shift @ inputs
    for alpha in (0.0, 0.3, 1.0):
        direct = ((weight @ inputs + alpha * mismatch - quantized @ inputs) ** 2).sum()
        split = (((weight + alpha * shift - quantized) @ inputs) ** 2).sum() + alpha**2 * (unreachable**2).sum()
        torch.testing.assert_close(direct, split)


def test_the_quadratic_is_the_output_error() -> None:
    weight, hessian = problem(4, 24)
    difference = weight - weight.round()
    factor = factorize(hessian, 0.0)
    direct = torch.einsum("mi,ij,mj->m", difference.double(), hessian.double(), difference.double()).float()
    torch.testing.assert_close(quadratic(difference, factor), direct, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_a_beam_of_one_is_greedy_and_wider_ones_are_no_worse(make: object) -> None:
    weight, hessian = problem(12, 70)
    grid, factor = make(weight), factorize(hessian)  # type: ignore[operator]
    greedy, _ = successive_rounding(weight, grid, factor)
    assert torch.equal(beam_search(weight, grid, factor, width=1), greedy)

    def loss(codes: Tensor) -> Tensor:
        return quadratic(weight - grid.dequantize(codes), factor)

    wide = beam_search(weight, grid, factor, width=4)
    assert bool((loss(wide) <= loss(greedy)).all())
    assert float(loss(wide).sum()) < float(loss(greedy).sum())


@pytest.mark.parametrize("make", [lambda w: uniform(w, bits=2, group_size=None), codebook], ids=["uniform", "codebook"])
def test_a_wide_beam_is_exhaustive_search(make: object) -> None:
    weight, hessian = problem(3, 4, seed=3)
    grid, factor = make(weight), factorize(hessian)  # type: ignore[operator]
    count = len(grid.grid.levels)
    every = torch.tensor(list(itertools.product(range(count), repeat=4)), dtype=torch.uint8)
    found = beam_search(weight, grid, factor, width=count**4)
    for row in range(3):
        one = grid.rows(row, row + 1)
        values = torch.cat([one.dequantize(codes[None]) for codes in every])
        best = quadratic(weight[row] - values, factor).min()
        mine = quadratic(weight[row : row + 1] - one.dequantize(found[row : row + 1]), factor)[0]
        torch.testing.assert_close(mine, best)


def test_coordinate_descent_ends_where_no_single_change_helps() -> None:
    weight, hessian = problem(5, 20)
    grid, factor = uniform(weight, bits=2), factorize(hessian)
    greedy, _ = successive_rounding(weight, grid, factor)
    codes = coordinate_descent(weight, greedy, grid, factor, passes=50, block=8)

    def loss(c: Tensor) -> Tensor:
        return quadratic(weight - grid.dequantize(c), factor)

    final = loss(codes)
    assert bool((final <= loss(greedy) * (1 + 1e-6)).all())
    for column in range(20):
        for code in range(4):
            changed = codes.clone()
            changed[:, column] = code
            assert bool((loss(changed) >= final * (1 - 1e-5)).all())


def test_min_pivot_order_takes_the_smallest_pivot_last() -> None:
    """Slow: at each step the Schur complement of every candidate, by an explicit inverse."""
    _, hessian = problem(1, 10, seed=2)
    picked: list[int] = []
    for _ in range(10):
        left = [j for j in range(10) if j not in picked]
        inner = torch.linalg.inv(hessian[picked][:, picked].double()) if picked else torch.zeros(0, 0).double()
        schur = {
            j: float(hessian[j, j] - hessian[j, picked].double() @ inner @ hessian[picked, j].double()) for j in left
        }
        picked.append(min(left, key=schur.__getitem__))
    assert column_order(hessian, "min_pivot").tolist() == picked[::-1]


def test_factor_reproduces_the_hessian_and_solves() -> None:
    weight, hessian = problem(3, 30)
    before = hessian.clone()
    factor = factorize(hessian, 0.05)
    assert torch.equal(hessian, before)  # damping must not add up over linears that share the Hessian
    assert torch.equal(factor.upper, factor.upper.triu())
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(factor.upper @ factor.upper.T, damped[factor.order][:, factor.order])
    torch.testing.assert_close(factor.hessian, damped[factor.order][:, factor.order])
    torch.testing.assert_close(factor.solve(weight), weight @ torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


def test_dead_columns_are_rounded_to_nearest_and_named() -> None:
    weight, hessian = problem(4, 20)
    hessian[7, :] = hessian[:, 7] = 0.0
    grid, factor = uniform(weight), factorize(hessian)
    codes, _ = successive_rounding(weight, grid, factor)
    assert torch.equal(codes[:, 7], grid.round(weight)[:, 7])
    assert any("1 input channels" in note for note in factor.notes)


def test_a_singular_hessian_is_damped_and_an_indefinite_one_noted_or_refused() -> None:
    _, hessian = problem(1, 30, tokens=5)
    assert factorize(hessian, 0.01).damping == 0.01
    indefinite = torch.eye(8) - 0.3 * torch.ones(8, 8)  # smallest eigenvalue -1.4, mean diagonal 0.7
    with pytest.raises(NumericalError, match="damping 1"):
        factorize(indefinite)
    slightly = torch.eye(8) - 0.13 * torch.ones(8, 8)
    factor = factorize(slightly)
    assert factor.damping > 0.01
    assert any("raised" in note for note in factor.notes)


def test_a_hessian_that_is_not_finite_is_refused_and_one_of_zeros_is_all_dead_columns() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        factorize(torch.full((4, 4), float("nan")))
    factor = factorize(torch.zeros(4, 4))
    assert any("4 input channels" in note for note in factor.notes)
    assert torch.equal(factor.upper, factor.upper.diagonal().diag())


@pytest.mark.parametrize("width", [128, 129, 300])
def test_a_solve_by_blocks_is_a_solve(width: int) -> None:
    weight, hessian = problem(5, width)
    before = weight.clone()
    factor = factorize(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(width)
    expected = torch.linalg.solve(damped, weight.double().T).T
    solved = factor.solve(weight)
    assert torch.equal(weight, before)
    assert float((solved - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_a_sweep_over_several_blocks_is_the_column_formula(make: object) -> None:
    """Slow: w_j = T_j + sum over columns before it of error times U_kj / U_jj, in float64, one column at a time."""
    weight, hessian = problem(4, 200)
    grid, factor = make(weight), factorize(hessian)  # type: ignore[operator]
    upper, permuted = factor.upper.double(), grid.permuted(factor.order)
    wanted = weight[:, factor.order].double()
    errors = torch.zeros_like(wanted)
    close = 0
    codes, _ = successive_rounding(weight, grid, factor)
    for j in range(200):
        column = wanted[:, j] + errors[:, :j] @ upper[:j, j] / upper[j, j]
        scale, zero = permuted.scale_of(j, j + 1)
        nearest_code = grid.grid.nearest(column.float()[:, None] / scale + zero)
        found = codes[:, factor.order[j], None]
        close += int((found != nearest_code).sum())  # a tie that float32 and float64 decide differently
        errors[:, j] = wanted[:, j] - ((grid.grid.values(found) - zero) * scale)[:, 0].double()
    assert close <= 2


def test_operations_grow_as_they_should() -> None:
    assert sweep_flops(10, 30) == 10 * 30 * 30  # m n^2 / 2 multiply-adds
    assert solve_flops(10, 30) == 2 * sweep_flops(10, 30)
    assert factorize_flops(30) == 9000
    assert beam_flops(10, 30, 4) > beam_flops(10, 30, 2) > sweep_flops(10, 30)


@dataclasses.dataclass(frozen=True)
class PairGrid(ScaledGrid):
    """A codebook of pairs: entry ``[K, 2]``, one scale for all."""

    table: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, 2))

    @property
    def columns(self) -> int:
        return 2

    def round_columns(self, values: Tensor, start: int) -> Tensor:
        return torch.cdist(values, self.table).argmin(1).to(torch.uint8)

    def value_columns(self, codes: Tensor, start: int) -> Tensor:
        return self.table[codes.long()]


def test_columns_that_are_rounded_together_take_over_errors_together() -> None:
    """A codebook of pairs against the slow formula: each pair is nearest to the exact minimiser of the rest."""
    generator = torch.Generator().manual_seed(0)
    target, inputs = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    inputs = inputs @ torch.randn(8, 8, generator=generator)
    factor = factorize(inputs.T @ inputs, 0.01, "natural")
    table = torch.randn(64, 2, generator=generator)
    one = torch.ones(64, 1)
    grid = PairGrid(uniform_grid(2), one, one, torch.zeros(8, dtype=torch.int64), {}, table)
    codes, _ = successive_rounding(target, grid, factor)
    assert codes.shape == (64, 4)

    hessian = factor.hessian.double()
    found = torch.zeros(64, 8, dtype=torch.float64)
    for start in range(0, 8, 2):
        done, rest = slice(0, start), slice(start, 8)
        # with the columns before held, the real-valued minimiser of (T - Q) H (T - Q)^T over the rest
        error = target[:, done].double() - found[:, done]
        best = target[:, rest].double() + torch.linalg.solve(hessian[rest, rest], hessian[rest, done] @ error.T).T
        pick = torch.cdist(best[:, :2].float(), table).argmin(1)
        assert torch.equal(pick.to(torch.uint8), codes[:, start // 2])
        found[:, start : start + 2] = table[pick].double()
    alone = torch.cat([table[torch.cdist(target[:, i : i + 2], table).argmin(1)] for i in range(0, 8, 2)], 1)
    assert quadratic(target - found.float(), factor).sum() < quadratic(target - alone, factor).sum()


def test_a_drifting_target_is_refused_where_columns_are_rounded_together() -> None:
    one = torch.ones(2, 1)
    grid = PairGrid(uniform_grid(2), one, one, torch.zeros(8, dtype=torch.int64), {}, torch.randn(4, 2))
    factor = factorize(torch.eye(8), 0.01, "natural")
    with pytest.raises(UsageError, match="neither a drifting target"):
        successive_rounding(torch.randn(2, 8), grid, factor, drift=torch.zeros(8, 8))
    with pytest.raises(UsageError, match="natural order"):
        successive_rounding(torch.randn(2, 7), grid, factorize(torch.eye(7), 0.01, "natural"))

"""Streamed statistics against the direct formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.errors import NumericalError
from calib.precision import product_t, strict_float32
from calib.stats import GroupStatistics, Stat, StatisticsAccumulator, effective_tokens

ALL = frozenset(Stat)


def streams(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5, 7, 12, generator=generator)
    return inputs, inputs + 0.1 * torch.randn(5, 7, 12, generator=generator)


def gather(inputs: Tensor, full: Tensor | None, weights: dict[str, Tensor], needs: frozenset[Stat]) -> GroupStatistics:
    accumulator = StatisticsAccumulator("block.layer", weights, needs)
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        accumulator.add(inputs[start:stop], None if full is None else full[start:stop])
    return accumulator.finish()


@pytest.mark.parametrize("rows", [3, 40])  # fewer and more rows than inputs: energy by product and by Gram matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_and_energy(rows: int, dtype: torch.dtype) -> None:
    inputs, full = (x.to(dtype) for x in streams())
    weights = {"q": torch.randn(rows, 12).to(dtype), "k": torch.randn(2, 12).to(dtype)}
    stats = gather(inputs, full, weights, frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY}))
    x, other = inputs.reshape(-1, 12).double(), full.reshape(-1, 12).double()
    assert stats.tokens == 35
    assert stats.sequences == 5
    assert stats.moments is not None
    assert stats.moments.mismatch is not None
    torch.testing.assert_close(stats.moments.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(stats.moments.mismatch.double(), (other - x).T @ x, rtol=tolerance, atol=2 * tolerance)
    for name, weight in weights.items():
        energy = (((other - x) @ weight.double().T) ** 2).sum(0)
        torch.testing.assert_close(stats.energy[name].double(), energy, rtol=10 * tolerance, atol=1e-4)


def test_folds_are_the_even_and_odd_sequences_of_each_batch() -> None:
    inputs, full = streams()
    stats = gather(inputs, full, {"q": torch.randn(3, 12)}, ALL)
    even, odd = inputs[[0, 2, 4]].reshape(-1, 12), inputs[[1, 3]].reshape(-1, 12)
    torch.testing.assert_close(stats.folds[0].hessian, even.T @ even)
    torch.testing.assert_close(stats.folds[1].hessian, odd.T @ odd)
    assert stats.moments is not None
    torch.testing.assert_close(stats.moments.hessian, stats.folds[0].hessian + stats.folds[1].hessian)


def test_nothing_is_gathered_that_was_not_asked_for() -> None:
    inputs, _ = streams()
    stats = gather(inputs, None, {"q": torch.randn(3, 12)}, frozenset({Stat.HESSIAN}))
    assert stats.moments is not None
    assert stats.moments.mismatch is None
    assert stats.folds == ()
    one = stats.of("q")
    assert not one.has_mismatch
    with pytest.raises(ValueError, match="mismatch"):
        _ = one.mismatch
    with pytest.raises(ValueError, match="independent"):
        _ = one.effective_tokens


def test_what_linears_share_is_made_once() -> None:
    inputs, _ = streams()
    stats = gather(inputs, None, {"q": torch.randn(3, 12), "k": torch.randn(3, 12)}, frozenset({Stat.HESSIAN}))
    made = [stats.of(name).group.memo("factor", lambda: object()) for name in ("q", "k")]
    assert made[0] is made[1]


def test_inputs_that_are_not_finite_name_the_layer_and_the_share() -> None:
    inputs, _ = streams()
    inputs[3, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"block\.layer.*7\.14%"):
        gather(inputs, None, {"q": torch.randn(3, 12)}, frozenset({Stat.HESSIAN}))


def test_effective_tokens_of_independent_and_of_copied_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    independent = torch.rand(200, 50, generator=generator)
    assert effective_tokens(independent) > 0.7 * independent.numel()
    copied = torch.rand(200, 1, generator=generator).expand(200, 50)
    assert effective_tokens(copied) == pytest.approx(200, rel=0.01)


def test_products_of_bfloat16_are_exact_and_settings_are_restored() -> None:
    a, b = (torch.randn(300, 9).bfloat16() for _ in range(2))
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with strict_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
        torch.testing.assert_close(product_t(a, b).double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


NEEDS = {
    "by product, folds": (ALL, 3),
    "by gram": (frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY}), 200),
    "one stream": (frozenset({Stat.HESSIAN}), 3),
}


@pytest.mark.parametrize(("needs", "rows"), NEEDS.values(), ids=NEEDS)
def test_sums_over_processes_are_the_sums_of_one(needs: frozenset[Stat], rows: int) -> None:
    """Four sequences on one process, and on three of which one sees none; folds depend on places in a batch."""
    generator = torch.Generator().manual_seed(3)
    width = 130  # two blocks of the symmetric products
    inputs = torch.randn(4, 9, width, generator=generator)
    full = inputs + 0.1 * torch.randn(4, 9, width, generator=generator)
    weights = {"q": torch.randn(rows, width, generator=generator)}
    batches = [(inputs[i : i + 2], full[i : i + 2] if len(needs) > 1 else None) for i in (0, 2)]
    alone, first, second, idle = (StatisticsAccumulator("layer", weights, needs) for _ in range(4))
    for batch in batches:
        alone.add(*batch)
    first.add(*batches[1])
    second.add(*batches[0])
    seen: list[list[Tensor]] = [[], [], []]
    for process, part in enumerate((first, second, idle)):
        part.reduce_(seen[process].append, lambda tensor: [tensor])
    for group in zip(*seen, strict=True):
        assert all(tensor.dtype == torch.float64 for tensor in group)
        total = group[0] + group[1] + group[2]
        for tensor in group:
            tensor.copy_(total)
    expected, result = alone.finish(), idle.finish()
    assert (result.tokens, result.sequences) == (expected.tokens, expected.sequences) == (36, 4)
    assert expected.moments is not None
    assert result.moments is not None
    assert torch.equal(result.moments.hessian, expected.moments.hessian)
    if len(needs) > 1:
        assert torch.equal(result.moments.mismatch, expected.moments.mismatch)
        assert torch.equal(result.energy["q"], expected.energy["q"])
    for mine, theirs in zip(result.folds, expected.folds, strict=True):
        assert torch.equal(mine.hessian, theirs.hessian)
    for name, count in expected.effective_tokens.items():
        assert result.effective_tokens[name] == pytest.approx(count, rel=1e-9)


def test_the_hessian_is_symmetric_to_the_bit() -> None:
    inputs = torch.randn(5, 50, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    stats = gather(inputs, None, {"q": torch.randn(3, 300)}, frozenset({Stat.HESSIAN}))
    assert stats.moments is not None
    direct = inputs.reshape(-1, 300).double()
    torch.testing.assert_close(stats.moments.hessian.double(), direct.T @ direct, rtol=1e-5, atol=1e-4)
    off_diagonal = [stats.moments.hessian[:75, 75:], stats.moments.hessian[75:, :75].T]
    assert torch.equal(*off_diagonal)


def test_float64_sums_do_not_lose_small_batches() -> None:
    """2^24 + 1 + 1 in float32 is 2^24."""
    accumulator = StatisticsAccumulator("layer", {"q": torch.ones(1, 1)}, frozenset({Stat.HESSIAN}))
    for value in (2.0**12, 1.0, 1.0):
        accumulator.add(torch.full((1, 1, 1), value), None)
    moments = accumulator.finish().moments
    assert moments is not None
    assert float(moments.hessian) == 2.0**24 + 2


def test_operations_are_counted() -> None:
    inputs, full = torch.randn(2, 50, 256), torch.randn(2, 50, 256)
    needs = frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})
    one = StatisticsAccumulator("layer", {"q": torch.randn(3, 256)}, frozenset({Stat.HESSIAN}))
    one.add(inputs, None)
    assert 100 * 256 * 256 < one.flops < 2 * 100 * 256 * 256  # more than the triangle, less than the square
    two = StatisticsAccumulator("layer", {"q": torch.randn(3, 256)}, needs)
    two.add(inputs, full)
    assert two.flops == one.flops + 2 * 100 * 256 * 256 + 2 * 100 * 256 * 3


def test_effective_tokens_is_its_formula() -> None:
    values = torch.rand(20, 30, generator=torch.Generator().manual_seed(2)) + torch.rand(20, 1)
    between, within = values.double().mean(1).var().item(), values.double().var().item()
    assert effective_tokens(values) == pytest.approx(600 / (between * 30 / within), rel=1e-9)
    assert effective_tokens(torch.full((4, 5), 0.3)) == 20
    assert effective_tokens(values[:1]) == 30

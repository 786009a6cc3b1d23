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

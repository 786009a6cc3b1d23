"""Divergence from what is kept of a base: the bounds, the estimate over draws and its error, against float64 sums."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import ModelError
from evals.texts.kl import DRAWS, Scores, TopKLogprobs, join, keep_top_k, score_against, score_alone

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int, vocab: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=generator(seed))


def slow_kl(base: Tensor, model: Tensor) -> Tensor:
    """``sum p ln(p / q)``, float64, term by term."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (base, model))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def slow_bounds(base: list[float], model: list[float], top: list[int]) -> tuple[float, float]:
    """The docstring's formulas for one position, in Python."""
    p, q = (torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0).tolist() for logits in (base, model))
    others = [token for token in range(len(p)) if token not in top]
    assert min(p[token] for token in top) >= max(p[token] for token in others)  # ties may go either way
    inside = sum(p[t] * math.log(p[t] / q[t]) for t in top)
    rest, model_rest = sum(p[t] for t in others), sum(q[t] for t in others)
    if rest == 0:
        return inside, inside
    low = inside + rest * math.log(rest / model_rest)
    return low, inside + sum(p[t] * math.log(p[t]) for t in others) - rest * math.log(min(q))


def compare(base: Tensor, model: Tensor, top_k: int | None, seed: int = 0) -> dict[str, Tensor]:
    """All columns of `Scores`, for true tokens ``0, 1, 2, ...``."""
    targets = torch.arange(len(base)) % base.shape[1]
    scores = score_against(model, targets, keep_top_k(base, targets, top_k, generator(seed)))
    return {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Logits of a base and a model, and how many tokens are kept: flat, peaked, with ties, far apart or near."""
    vocab = draw(st.integers(2, 30))
    seed, scale = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]))
    base = normal(6, vocab, scale, seed)
    shift = normal(6, vocab, draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 5.0])), seed + 1)
    kind = draw(st.sampled_from(["as they are", "ties", "one-hot", "two tokens"]))
    if kind == "ties":
        base = base.round()
    if kind != "as they are" and kind != "ties":
        base[:, draw(st.integers(0, vocab - 1))] += draw(st.sampled_from([20.0, 60.0, 100.0]))
    if kind == "two tokens":
        base[:, draw(st.integers(0, vocab - 1))] += 60
    return base, base + shift, draw(st.integers(1, vocab + 2))


def close(base: Tensor, model: Tensor) -> Tensor:
    """What float32 may be off by: eps times the size of the logits' differences, a few times over."""
    return 2e-6 * (1 + (base.amax(1) - base.amin(1)) + (model.amax(1) - model.amin(1))).double()


@given(pairs())
def test_the_exact_divergence_is_between_the_bounds(pair: tuple[Tensor, Tensor, int]) -> None:
    base, model, top_k = pair
    exact, off = slow_kl(base, model), close(base, model)
    found = compare(base, model, top_k)
    assert (found["kl_low"] <= exact + off).all()
    assert (exact <= found["kl_high"] + off).all()
    assert (found["kl_low"] <= found["kl_high"]).all()
    assert (found["kl_low"] >= -off).all()
    for name in ("kl", "kl_low", "kl_high", "kl_variance"):
        assert found[name].dtype == torch.float64
        assert torch.isfinite(found[name]).all()


@given(pairs())
def test_the_bounds_are_those_of_the_formulas(pair: tuple[Tensor, Tensor, int]) -> None:
    base, model, top_k = pair
    found, off = compare(base, model, top_k), close(base, model)
    tops = keep_top_k(base, torch.zeros(len(base), dtype=torch.int64), top_k, generator()).ids
    if tops is None:
        assert top_k >= base.shape[1]
    else:
        assert tops.shape == (len(base), top_k)
        for row in range(len(base)):
            low, high = slow_bounds(base[row].tolist(), model[row].tolist(), tops[row].tolist())
            assert found["kl_low"][row].item() == pytest.approx(low, abs=off[row].item(), rel=1e-5)
            assert found["kl_high"][row].item() == pytest.approx(high, abs=2 * off[row].item(), rel=1e-5)


@given(pairs())
@example((normal(3, 5), normal(3, 5, seed=1), 5))
def test_with_the_whole_vocabulary_it_is_exact(pair: tuple[Tensor, Tensor, int]) -> None:
    base, model, _ = pair
    for top_k in (None, base.shape[1], base.shape[1] + 7):
        found = compare(base, model, top_k)
        torch.testing.assert_close(found["kl"], slow_kl(base, model), rtol=1e-5, atol=close(base, model).max().item())
        assert torch.equal(found["kl"], found["kl_low"])
        assert torch.equal(found["kl"], found["kl_high"])
        assert not found["kl_variance"].any()


@given(pairs())
def test_scores_of_the_true_token_and_the_likeliest(pair: tuple[Tensor, Tensor, int]) -> None:
    base, model, top_k = pair
    found, off = compare(base, model, top_k), close(base, model).max().item()
    p, q = (torch.softmax(logits.double(), dim=-1) for logits in (base, model))
    for row in range(len(base)):
        true = row % base.shape[1]
        assert found["nll"][row].item() == pytest.approx(-math.log(q[row, true]), abs=off)
        assert found["base_nll"][row].item() == pytest.approx(-math.log(p[row, true]), abs=off)
        same = base[row].tolist().index(max(base[row])) == model[row].tolist().index(max(model[row]))
        assert found["same_top"][row].item() == float(same)  # ties go to the first token


# A base and a model whose bounds are near (below 0.02 nats) and far: the estimate differs, its mean does not.
NEAR, FAR = 0.05, 1.5
DRAWN = 3000


def repeated(shift: float, top_k: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """One position, drawn for 3,000 times; and its exact divergence."""
    base = normal(1, 60, 1.5, seed)
    model = base + normal(1, 60, shift, seed + 100)
    rows = base.expand(DRAWN, -1), model.expand(DRAWN, -1)
    return compare(*rows, top_k, seed), slow_kl(base, model).item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top_k", [1, 5, 50])
@pytest.mark.parametrize("shift", [NEAR, FAR])
def test_the_estimate_is_right_on_average(shift: float, top_k: int, seed: int) -> None:
    found, exact = repeated(shift, top_k, seed)
    if top_k > 1:  # else the lower bound of distributions that are far may still be small
        assert (found["kl_low"][0].item() < 0.02) == (shift == NEAR)
    error = found["kl"].std().item() / DRAWN**0.5
    assert error > 0
    assert abs(found["kl"].mean().item() - exact) < 4 * error + 1e-7
    assert error < 0.03 * exact  # so that a bias would show


@pytest.mark.parametrize("shift", [NEAR, FAR])
def test_its_variance_is_known(shift: float) -> None:
    for seed in range(4):
        found, _ = repeated(shift, 5, seed)
        assert found["kl_variance"].mean().item() == pytest.approx(found["kl"].var().item(), rel=0.12)


def test_near_distributions_have_less_noise() -> None:
    """What the added term is for: the plain mean of ``ln(p / q)`` has fifty times the variance."""
    base = normal(1, 60, 1.5)
    model = base + normal(1, 60, NEAR, 100)
    found, _ = repeated(NEAR, 5, 0)
    p, q = (torch.softmax(logits[0].double(), dim=-1) for logits in (base, model))
    others = p.argsort(descending=True)[5:]
    weights, values = p[others] / p[others].sum(), (p / q).log()[others]
    plain = p[others].sum() ** 2 * (weights * (values - (weights * values).sum()) ** 2).sum() / DRAWS
    assert found["kl"].var().item() < plain.item() / 50


def test_the_mean_over_tokens_is_within_its_error() -> None:
    """As it is used: each position drawn for once, many positions."""
    base = normal(1500, 80, 2.0)
    for shift in (NEAR, 0.3, FAR):
        model = base + normal(1500, 80, shift, 1)
        found = compare(base, model, 8)
        error = found["kl_variance"].sum().sqrt().item() / 1500
        assert 0 < error < 0.01 * slow_kl(base, model).mean().item()
        assert abs(found["kl"].mean() - slow_kl(base, model).mean()).item() < 4 * error


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_a_model_equal_to_the_base(scale: float) -> None:
    logits = normal(50, 40, scale)
    full = compare(logits, logits, None)
    assert not full["kl"].any()
    part = compare(logits, logits, 4)
    assert part["kl"].abs().max() < 1e-6
    assert part["kl_low"].abs().max() < 1e-6
    for found in (full, part):
        assert found["same_top"].all()
        assert torch.equal(found["nll"], found["base_nll"])


def test_what_is_kept() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    p = torch.softmax(logits.double()[0], dim=-1)
    kept = keep_top_k(logits, torch.tensor([2]), 2, generator())
    assert kept.ids is not None
    assert kept.drawn is not None
    assert kept.drawn_log_p is not None
    assert kept.ids.tolist() == [[1, 3]]
    torch.testing.assert_close(kept.log_p, p[[1, 3]].log().float()[None])
    assert kept.tail_mass.item() == pytest.approx((p[0] + p[2]).item(), rel=1e-6)
    assert kept.tail_entropy.item() == pytest.approx((p[0] * p[0].log() + p[2] * p[2].log()).item(), rel=1e-6)
    assert kept.nll.item() == pytest.approx(-p[2].log().item(), rel=1e-6)
    assert (kept.top.item(), kept.vocab) == (1, 4)
    assert kept.drawn.shape == (1, DRAWS)
    assert set(kept.drawn[0].tolist()) <= {0, 2}
    torch.testing.assert_close(kept.drawn_log_p, p.log().float()[kept.drawn])
    whole = keep_top_k(logits, torch.tensor([2]), None, generator())
    assert (whole.ids, whole.drawn, whole.drawn_log_p) == (None, None, None)
    torch.testing.assert_close(whole.log_p, p.log().float()[None])


def test_draws_are_from_the_others_by_their_probability() -> None:
    logits = torch.tensor([[2.0, 5.0, 1.0, 0.0, 4.0, 1.5]]).expand(500, -1)
    kept = keep_top_k(logits, torch.zeros(500, dtype=torch.int64), 2, generator())
    assert kept.drawn is not None
    p = torch.softmax(logits[0].double(), dim=-1)
    expected = p.clone()
    expected[[1, 4]] = 0
    expected /= expected.sum()
    counts = torch.bincount(kept.drawn.flatten(), minlength=6).double()
    error = (expected * (1 - expected) * counts.sum()).sqrt()
    assert counts[[1, 4]].tolist() == [0, 0]
    assert ((counts - expected * counts.sum()).abs() <= 4 * error).all()


def test_draws_come_from_the_generator() -> None:
    logits, targets = normal(5, 30), torch.zeros(5, dtype=torch.int64)
    state = torch.random.get_rng_state()
    first, again, other = (keep_top_k(logits, targets, 3, generator(seed)).drawn for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("top_k", [None, 4])
def test_parts_and_joins(top_k: int | None) -> None:
    base, model, targets = normal(9, 20), normal(9, 20, seed=1), torch.arange(9)
    kept = keep_top_k(base, targets, top_k, generator())
    whole = score_against(model, targets, kept)
    places = [slice(0, 4), slice(4, 5), slice(5, 9)]
    back = join([kept.part(place, CPU) for place in places])
    parts = join([score_against(model[place], targets[place], kept.part(place, CPU)) for place in places])
    assert isinstance(back, TopKLogprobs)
    assert isinstance(parts, Scores)
    for first, second in ((kept, back), (whole, parts)):
        for field in dataclasses.fields(first):  # type: ignore[arg-type]
            values: list[Any] = [getattr(first, field.name), getattr(second, field.name)]
            if isinstance(values[0], Tensor):
                torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)
            else:
                assert values[0] == values[1]


def test_the_logits_are_left_as_they_were() -> None:
    base, model, targets = normal(4, 20), normal(4, 20, seed=1), torch.arange(4)
    copies = base.clone(), model.clone()
    kept = keep_top_k(base, targets, 3, generator())
    before = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
    tensors = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    score_against(model, targets, kept)
    assert torch.equal(base, copies[0])
    assert torch.equal(model, copies[1])
    assert all(torch.equal(before[name], value) for name, value in tensors.items())


def test_alone() -> None:
    logits, targets = normal(6, 11, 4.0), torch.arange(6)
    found = score_alone(logits, targets)
    expected = -torch.softmax(logits.double(), dim=-1)[targets, targets].log()
    torch.testing.assert_close(found.nll, expected, rtol=1e-6, atol=1e-6)
    assert found.nll.dtype == torch.float64
    assert found.kl is None
    half = score_alone(logits.bfloat16(), targets).nll
    assert torch.equal(half, score_alone(logits.bfloat16().float(), targets).nll)  # the softmax is in float32


@pytest.mark.parametrize("top_k", [None, 4])
def test_softmaxes_are_in_float32_whatever_the_logits_are(top_k: int | None) -> None:
    base, model = normal(6, 30, 4.0).bfloat16(), normal(6, 30, 4.0, 1).bfloat16()
    half, single = compare(base, model, top_k), compare(base.float(), model.float(), top_k)
    assert all(torch.equal(half[name], single[name]) for name in half)


def test_tokens_that_both_rule_out_do_not_matter() -> None:
    base, model = normal(4, 12), normal(4, 12, seed=1)
    exact = slow_kl(base, model)
    masked = [torch.cat([logits, torch.full((4, 3), -torch.inf)], dim=1) for logits in (base, model)]
    torch.testing.assert_close(compare(*masked, None)["kl"], exact, rtol=1e-5, atol=1e-6)
    found = compare(*masked, 4)
    assert torch.isfinite(found["kl"]).all()
    assert (found["kl_low"] <= exact + 1e-6).all()
    assert (found["kl_high"] >= exact - 1e-6).all()  # infinite: nobody kept that the base rules these out as well


def test_other_vocabularies_are_refused() -> None:
    kept = keep_top_k(normal(2, 20), torch.zeros(2, dtype=torch.int64), 3, generator())
    with pytest.raises(ModelError, match=r"vocabularies of 21 and 20 entries: .* its own full-precision base"):
        score_against(normal(2, 21), torch.zeros(2, dtype=torch.int64), kept)

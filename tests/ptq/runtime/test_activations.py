"""`quantize_tokens` against a slow formula, token by token and channel by channel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.runtime.activations import quantize_tokens, quantized_channels

BITS = st.integers(2, 8)
VALUES = st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
TOKENS = st.lists(VALUES, min_size=1, max_size=12)


def slow_grid(token: list[float], bits: int, symmetric: bool) -> tuple[float, int, int]:
    """Step, lowest and highest level of one token, in double precision."""
    lo, hi = min(0.0, *token), max(0.0, *token)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return max(hi, -lo) / top, -top, top
    step = (hi - lo) / (2**bits - 1)
    zero = round(-lo / step) if step else 0
    return step, -zero, 2**bits - 1 - zero


@settings(deadline=None, max_examples=150)
@given(TOKENS, BITS, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_values_are_the_formula(token: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.tensor([token], dtype=dtype)
    got = quantize_tokens(x, bits, symmetric)
    token = x[0].double().tolist()
    step, low, high = slow_grid(token, bits, symmetric)
    for value, result in zip(token, got[0].double().tolist(), strict=True):
        near = [min(max(math.floor(value / step) + k, low), high) for k in (0, 1)] if step else [0]
        nearest = min(abs(level * step - value) for level in near)
        room = step * 1e-4 + abs(result) * (2**-8 if dtype == torch.bfloat16 else 1e-6)  # rounding of the arithmetic
        assert abs(result - value) <= nearest + room  # one of the two when a value lies in the middle
        assert abs(result - value) <= step / 2 + room
        assert min(abs(result - level * step) for level in range(low, high + 1)) <= room
    assert got.dtype == dtype


@settings(deadline=None)
@given(TOKENS, BITS, st.booleans(), st.floats(0, 1))
def test_a_share_rounds_the_first_channels_with_the_range_of_all(
    token: list[float], bits: int, symmetric: bool, share: float
) -> None:
    x = torch.tensor([token, token[::-1]])
    count = quantized_channels(len(token), share)
    got, whole = quantize_tokens(x, bits, symmetric, share), quantize_tokens(x, bits, symmetric)
    assert torch.equal(got[:, :count], whole[:, :count])
    assert torch.equal(got[:, count:], x[:, count:])


@pytest.mark.parametrize(("width", "share", "count"), [(10, 0.5, 5), (7, 0.5, 4), (30, 0.1, 3), (3, 1.0, 3), (4, 0, 0)])
def test_quantized_channels(width: int, share: float, count: int) -> None:
    assert quantized_channels(width, share) == count


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(symmetric: bool) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, 1.0], [1.0, 0.0]])
    got = quantize_tokens(x, 4, symmetric)
    assert torch.equal(got[[0, 4]], x[[0, 4]])
    assert got[1:4].isnan().all()  # other tokens of the batch are not touched by it
    assert quantize_tokens(torch.empty(0, 8), 4, symmetric).shape == (0, 8)
    largest = torch.tensor([[3e38, -3e38]])  # their difference has no float32
    assert torch.allclose(quantize_tokens(largest, 8, symmetric), largest, rtol=1e-2)
    least = torch.tensor([[1e-45, -1e-45]])
    assert quantize_tokens(least, 8, symmetric).isfinite().all()


@pytest.mark.parametrize("positive", [True, False])
def test_one_sided_tokens_keep_an_exact_zero(positive: bool) -> None:
    x = torch.tensor([0.0, 5.0, 9.0, 3.0]) * (1 if positive else -1)
    got = quantize_tokens(x, 2, symmetric=False)
    assert got.tolist() == [v * (1 if positive else -1) for v in (0.0, 6.0, 9.0, 3.0)]


def test_known_values() -> None:
    x = torch.tensor([-1.0, -0.4, 0.0, 0.6, 2.0])
    assert quantize_tokens(x, 2, symmetric=False).tolist() == [-1.0, 0.0, 0.0, 1.0, 2.0]
    assert quantize_tokens(x, 2, symmetric=True).tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]  # levels -2, 0, 2; ties to even


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_gradient_is_straight_through(share: float) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weights = torch.randn(3, 8)
    result = quantize_tokens(x, 3, False, share)
    (result * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    assert torch.equal(result, quantize_tokens(x.detach(), 3, False, share))


def test_nothing_is_kept_for_the_gradient() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantize_tokens(x, 4, False)
    assert kept == []


def test_the_input_is_not_changed() -> None:
    x = torch.randn(5, 8)
    before = x.clone()
    quantize_tokens(x, 4, False)
    assert torch.equal(x, before)

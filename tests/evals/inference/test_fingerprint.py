"""The fingerprint of weights: alike for alike models, another for any change, and a formula in plain Python."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evals.inference.fingerprint import model_fingerprint


class State:
    """Any state, as a model."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return self.tensors


def fingerprint(**tensors: Any) -> str:
    return model_fingerprint(State(**tensors))


def slow_fingerprint(name: str, value: Tensor) -> str:
    """For one float32 tensor, from its bytes."""
    raw = struct.pack(f"<{value.numel()}f", *value.flatten().tolist())
    whole = len(raw) // 8 * 8
    total = sum(struct.unpack(f"<{whole // 8}q", raw[:whole])) % 2**64  # the sum wraps round as whole numbers do
    signed = total - 2**64 if total >= 2**63 else total
    head = f"{name} torch.float32 {tuple(value.shape)} {(signed, sum(raw[whole:]))}"
    return hashlib.sha256(head.encode() + raw[:: max(1, len(raw) // 1024)]).hexdigest()


@pytest.mark.parametrize("shape", [(3, 4), (5000,), (1,), (), (0,), (50, 61)])
def test_the_formula(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert fingerprint(weight=value) == slow_fingerprint("weight", value)


def test_alike_models_have_one_fingerprint(make_model: Callable[..., Any]) -> None:
    first, again, other = make_model("llama", 0), make_model("llama", 0), make_model("llama", 1)
    assert model_fingerprint(first) == model_fingerprint(again)
    assert model_fingerprint(first) != model_fingerprint(other)
    assert model_fingerprint(first) != model_fingerprint(first.bfloat16())
    assert len(model_fingerprint(first)) == 64


@given(st.integers(0, 9999), st.integers(0, 31))
def test_a_bit_anywhere_shows(place: int, bit: int) -> None:
    """Also between the values that are sampled."""
    value = torch.arange(10_000, dtype=torch.float32)
    changed = value.clone()
    changed.view(torch.int32)[place] ^= torch.tensor(-(1 << 31) if bit == 31 else 1 << bit, dtype=torch.int32)
    assert fingerprint(w=value) != fingerprint(w=changed)


def test_names_shapes_and_types_count() -> None:
    value = torch.arange(12, dtype=torch.int32)
    prints = [
        fingerprint(w=value),
        fingerprint(v=value),
        fingerprint(w=value.view(3, 4)),
        fingerprint(w=value.view(4, 3)),
        fingerprint(w=value.view(torch.float32)),
        fingerprint(w=value.view(torch.int64)),
        fingerprint(w=value, v=value),
        fingerprint(),
    ]
    assert len(set(prints)) == len(prints)


def test_the_order_of_tensors_and_their_layout_do_not_count() -> None:
    first, second = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    assert fingerprint(a=first, b=second) == fingerprint(b=second, a=first)
    assert fingerprint(a=first) == fingerprint(a=first.T.contiguous().T)
    assert fingerprint(a=first, b=second) != fingerprint(a=first, b=first)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
    ],
)
def test_every_type(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2000)
    changed = zeros.clone()
    changed[1999] = 1
    prints = {fingerprint(w=value.to(dtype)) for value in (zeros, changed)}
    assert len(prints) == 2
    assert fingerprint(w=zeros.to(dtype)) != fingerprint(w=zeros)


def test_complex_numbers_have_two_parts() -> None:
    assert fingerprint(w=torch.tensor([1 + 2j])) != fingerprint(w=torch.tensor([1 + 3j]))


def test_what_is_no_tensor_here_is_left_out() -> None:
    value = torch.arange(3)
    assert fingerprint(w=value, extra={"a": 1}, far=torch.empty(5, device="meta")) == fingerprint(w=value)


def test_nan_and_infinity_are_bits_as_well() -> None:
    assert fingerprint(w=torch.tensor([float("nan")])) == fingerprint(w=torch.tensor([float("nan")]))
    assert fingerprint(w=torch.tensor([float("nan")])) != fingerprint(w=torch.tensor([float("inf")]))


def test_the_place_in_a_storage_does_not_count() -> None:
    """Tensors of a checkpoint are views of a file; words of eight bytes need not begin where they do."""
    storage = torch.arange(64, dtype=torch.uint8)
    for start in range(9):
        for size in (16, 13, 3):
            part = storage[start : start + size]
            assert fingerprint(w=part) == fingerprint(w=part.clone())

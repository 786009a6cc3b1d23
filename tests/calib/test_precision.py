"""Products against float64, in every memory layout that callers hand over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.precision import Operand, gram_bounds, product, product_t, strict_float32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.T.contiguous().T,
    "part of rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "part of columns": lambda x: torch.cat([x.T, x.T], 1)[:, : x.shape[0]].T,
    "every other": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("left", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS.values(), ids=LAYOUTS)
def test_product_is_the_product_in_every_layout(left: object, right: object) -> None:
    a, b = drawn(70, 90), drawn(90, 50, seed=1)
    result = product(left(a), right(b))  # type: ignore[operator]
    assert result.shape == (70, 50)
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 40, 1), (3, 1, 5), (0, 4, 3), (3, 0, 4), (200, 2, 1)])
def test_product_of_thin_and_of_empty_matrices(m: int, k: int, n: int) -> None:
    a, b = drawn(m, k), drawn(k, n, seed=1)
    torch.testing.assert_close(product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(a.double(), b.double()), a.double() @ b.double())


def test_products_keep_bits_that_shorter_formats_lose() -> None:
    """1 + 2^-20 needs 20 bits of mantissa: bfloat16 has 8, TF32 has 11."""
    a = torch.full((64, 64), 1 + 2.0**-20)
    with strict_float32():
        excess = product(a, torch.eye(64)) - 1
    assert torch.equal(excess, torch.full((64, 64), 2.0**-20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operand_is_multiplied_as_its_values(dtype: torch.dtype) -> None:
    a, b = drawn(300, 9).to(dtype), drawn(300, 7, seed=1).to(dtype)
    left, right = Operand.of(a), Operand.of(b)
    expected = a.double().T @ b.double()
    torch.testing.assert_close(left.transposed_by(right).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(left.columns(2, 5).transposed_by(right).double(), expected[2:5], rtol=1e-5, atol=1e-4)
    mixed = product_t(a.float(), b)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [1, 63, 64, 129, 576, 1000])
def test_blocks_of_a_symmetric_product_cover_it_once(width: int) -> None:
    bounds = gram_bounds(width)
    assert [column for start, stop in bounds for column in range(start, stop)] == list(range(width))
    assert all(start < stop for start, stop in bounds)

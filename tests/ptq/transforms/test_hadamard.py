"""Rotations: orthogonal, their own formula, equal products, gradients, the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq.errors import UsageError
from ptq.transforms.hadamard import (
    InputRotation,
    ResidualRotation,
    _butterflies,
    _products,
    hadamard,
    hadamard_blocks,
    hadamard_matrix,
    random_orthogonal,
)


def entry(i: int, j: int) -> float:
    """The unnormalised Walsh-Hadamard matrix: the parity of the bits that both indices have."""
    return -1.0 if (i & j).bit_count() % 2 else 1.0


def slow_matrix(sizes: tuple[int, ...]) -> Tensor:
    blocks = [
        torch.tensor([[entry(i, j) for j in range(n)] for i in range(n)], dtype=torch.float64) / n**0.5 for n in sizes
    ]
    return torch.block_diag(*blocks)


@pytest.fixture(scope="module")
def matrices() -> dict[int, Tensor]:
    """Slow matrices of single blocks."""
    return {n: slow_matrix((n,)) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)}


def test_agrees_with_the_explicit_matrix_on_all_widths(matrices: dict[int, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for width in range(1, 301):
        x = torch.randn(3, width, generator=generator, dtype=torch.float64)
        matrix = torch.block_diag(*(matrices[n] for n in hadamard_blocks(width)))
        torch.testing.assert_close(hadamard(x), x @ matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "sizes"),
    [(4096, (4096,)), (14336, (2048,) * 7), (576, (64,) * 9), (96, (64, 32)), (300, (256, 32, 8, 4)), (1, (1,))],
)
def test_blocks_of_known_widths(width: int, sizes: tuple[int, ...]) -> None:
    assert hadamard_blocks(width) == sizes


@given(st.integers(1, 5000))
def test_blocks_make_up_the_width(width: int) -> None:
    sizes = hadamard_blocks(width)
    assert sum(sizes) == width
    assert all(n & (n - 1) == 0 for n in sizes)


@given(st.integers(1, 300), st.integers(0, 5))
def test_an_input_rotation_is_orthogonal(width: int, seed: int) -> None:
    matrix = InputRotation(width, seed)(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.integers(1, 300), st.integers(0, 5))
def test_the_inverse_undoes_it(width: int, seed: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
    rotation = InputRotation(width, seed)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=0, atol=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize(("width", "block"), [(96, None), (576, None), (96, 32), (1024, 1024), (300, 4)])
def test_the_product_stays(width: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(5, 3, width, generator=generator), torch.randn(7, width, generator=generator)
    rotation = InputRotation(width, 3, block)
    torch.testing.assert_close(rotation(x) @ rotation.on_weight(w).T, x @ w.T, rtol=1e-5, atol=1e-4)


def test_second_moments_follow_the_inputs() -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rotation = InputRotation(96, 0)
    torch.testing.assert_close(rotation.on_hessian(x.T @ x), rotation(x).T @ rotation(x), rtol=1e-9, atol=1e-9)


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(256)
    x[17] = 16.0
    torch.testing.assert_close(InputRotation(256, 0)(x).abs(), torch.ones(256))


def test_gradients_are_the_transposed_map() -> None:
    rotation = InputRotation(96, 4)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(3), requires_grad=True)
    g = torch.randn(2, 96, generator=torch.Generator().manual_seed(4))
    rotation(x).backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, rotation.inverse(g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(5)).to(dtype)
    rotation = InputRotation(512, 0)
    assert rotation(x).dtype == dtype
    assert torch.equal(rotation(x), rotation(x.float()).to(dtype))
    assert torch.equal(rotation.inverse(x), rotation.inverse(x.float()).to(dtype))


def test_seeds_decide_the_signs() -> None:
    one, other = InputRotation(256, 0).signs, InputRotation(256, 1).signs
    assert one.dtype == torch.int8
    assert set(one.tolist()) == {-1, 1}
    assert torch.equal(one, InputRotation(256, 0).signs)
    assert not torch.equal(one, other)
    assert abs(int(one.sum())) < 64


@pytest.mark.parametrize("block", [0, 3, -2])
def test_a_block_that_is_no_power_of_two_is_refused(block: int) -> None:
    with pytest.raises(UsageError, match=rf"Hadamard blocks of {block}: .* power of two"):
        InputRotation(96, 0, block)


@pytest.mark.parametrize(
    ("width", "block", "sizes"),
    [
        (576, 256, (256, 256, 64)),
        (300, 256, (256, 32, 8, 4)),
        (96, 64, (64, 32)),
        (64, 256, (64,)),
        (512, 32, (32,) * 16),
    ],
)
def test_what_a_block_leaves_is_cut_smaller(
    width: int, block: int, sizes: tuple[int, ...], matrices: dict[int, Tensor]
) -> None:
    assert hadamard_blocks(width, block) == sizes
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.block_diag(*(matrices[n] for n in sizes))
    torch.testing.assert_close(hadamard(x, block), x @ matrix.T, rtol=0, atol=1e-12)


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(UsageError, match="width 8 was given vectors of width 4"):
        InputRotation(8, 0)(torch.zeros(2, 4))


@pytest.mark.parametrize("width", [1, 2, 7, 64, 96, 576])
def test_a_residual_rotation_is_orthogonal(width: int) -> None:
    q = random_orthogonal(width, 0)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    if width > 2:
        assert not torch.equal(q, random_orthogonal(width, 1))


def test_a_residual_rotation_is_a_kronecker_product_with_signs() -> None:
    q = random_orthogonal(24, 5)
    power = slow_matrix((8,))
    signs = torch.sign(q[0].unflatten(0, (8, 3))[:, 0] * q[0, 0])  # those of the first odd channel, up to one sign
    corner = q[:3, :3]
    for i in range(8):
        for j in range(8):
            block = q[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            torch.testing.assert_close(block.abs(), corner.abs(), rtol=0, atol=1e-12)
            ratio = block[0, 0] / corner[0, 0] * signs[0]
            assert torch.sign(ratio) == torch.sign(signs[j] * power[i, j] * power[0, 0])


@pytest.mark.parametrize("width", [2, 7, 64, 96])
def test_a_residual_rotation_can_keep_the_mean(width: int) -> None:
    rotation = ResidualRotation(width, 3, keep_ones=True)
    q, ones = rotation.matrix(), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation(ones), ones, rtol=0, atol=1e-12)
    assert width < 7 or float((ResidualRotation(width, 3)(ones) - ones).norm()) > 0.5
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(rotation(x), x.double() @ q.T)


@pytest.mark.parametrize("width", [1, 2, 32, 256, 512, 2048, 65536])
def test_products_of_matrices_are_the_butterflies(width: int) -> None:
    """What a GPU computes, here on a CPU."""
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(_products(x), _butterflies(x), rtol=0, atol=1e-11)


def test_a_product_in_half_precision_rounds_its_result_alone() -> None:
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    signed = (x * InputRotation(512, 3, 256).signs.bfloat16()).unflatten(-1, (-1, 256))
    found = (signed @ hadamard_matrix(256, torch.bfloat16, x.device)).flatten(-2)
    wanted = InputRotation(512, 3, 256)(x.double())
    assert bool(((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all())

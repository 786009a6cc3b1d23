"""The CPU kernel: the reference's float32 weights bit for bit, and products that differ by the order of sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ptq.quantized import QuantizedWeight
from ptq.runtime import cpu_products, extension
from ptq.runtime.dispatch import PackedWeight, choose, dequantized_tiles
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme
from ptq.transforms.hadamard import InputRotation

SCHEMES = [
    *(Scheme(bits, group_size=64, scale_dtype="float16") for bits in (2, 3, 4, 5, 8)),
    *(Scheme(bits, symmetric=False, group_size=32, scale_dtype="bfloat16") for bits in (2, 3, 4, 6, 7, 8)),
    Scheme(3, symmetric=False, group_size=None, scale_dtype="float16"),
    Scheme(4, group_size=128, scale_dtype="bfloat16"),
    *(Scheme.of(name) for name in ("nvfp4", "mxfp4", "fp4", "e2m1", "itq3s", "itq3s-104")),
    *(Scheme.of("higgs", bits=bits) for bits in (2, 3, 4)),
]
SHAPES = [(37, 384), (5, 64), (16, 576), (9, 1000), (3, 300)]  # odd rows, ragged groups, blocks and vectors


@pytest.fixture(params=["AVX-512", "AVX2"])
def vectors(request: pytest.FixtureRequest) -> Iterator[str]:
    if cpu_products._missing() is not None:
        pytest.skip(f"no CPU kernels here: {cpu_products._missing()}")
    torch.ops.ptq_cpu.use_avx2(request.param == "AVX2")
    yield request.param
    torch.ops.ptq_cpu.use_avx2(False)


def packed(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> PackedWeight | None:
    """A random weight, rounded; some groups are zero."""
    record = scheme.number_format
    width = {"nvfp4": 16, "mxfp4": 32}.get(scheme.format, 1)
    if columns % width or record.unsupported_reason(rows, columns, scheme):
        return None
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    target[1, :64] = 0
    grid = record.grid(record.fit(target, scheme, "minmax"), scheme, columns)
    weight = QuantizedWeight.from_grid(grid.round(target), grid, scheme)
    return PackedWeight(weight.tensors(), scheme, rows, columns)


def whole(weight: PackedWeight) -> Tensor:
    return torch.cat([tile for _, tile in dequantized_tiles(weight, torch.float32)])


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_weights_are_the_reference_bit_for_bit_and_products_its_sums(scheme: Scheme, vectors: str) -> None:
    for rows, columns in SHAPES:
        weight = packed(scheme, rows, columns)
        if weight is None:
            continue
        dense = whole(weight)
        assert torch.equal(cpu_products.dequantized(weight, slice(1, rows)), dense[1:])
        bias = torch.randn(rows)
        for batch in (1, 2, 3, 9, cpu_products._LARGE_BATCH):
            for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
                x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
                got = cpu_products.product(x, weight, bias)
                slow = x.double() @ dense.double().T + bias.to(dtype).double()
                assert got.dtype == dtype
                assert (got.double() - slow).norm() <= near * slow.norm()


def test_values_that_are_no_numbers_come_through_as_in_the_reference(vectors: str) -> None:
    weight = packed(Scheme(3, group_size=64, scale_dtype="float16"), 8, 128)
    assert weight is not None
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 128)
        x[1, 70] = value
        got, slow = cpu_products.product(x, weight, None), x @ whole(weight).T
        torch.testing.assert_close(got, slow, equal_nan=True)
    scaled = dict(weight.tensors)
    scaled["weight_scale"] = scaled["weight_scale"].clone()
    scaled["weight_scale"][3, 1] = float("nan")
    got = cpu_products.product(torch.ones(1, 128), PackedWeight(scaled, weight.scheme, 8, 128), None)
    assert torch.isnan(got).flatten().tolist() == [row == 3 for row in range(8)]


def test_a_layer_takes_it_by_itself_and_gradients_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_products._missing() is not None:
        pytest.skip(f"no CPU kernels here: {cpu_products._missing()}")
    monkeypatch.delenv("PTQ_KERNEL")
    weight = packed(Scheme.of("itq3s"), 24, 320)
    assert weight is not None
    quantized = QuantizedWeight.from_tensors(weight.tensors, weight.scheme, (24, 320))
    layer = QuantLinear.from_quantized(quantized, torch.randn(24))
    x = torch.randn(2, 3, 320)
    assert layer.kernel_name(x) == "cpu"
    fast, direct = layer(x), layer(x.requires_grad_())
    torch.testing.assert_close(fast, direct, rtol=1e-5, atol=1e-6)
    direct.sum().backward()
    assert x.grad is not None
    assert choose("cpu", torch.float64, weight.scheme, 24, 320).name == "reference"


def test_groups_that_are_no_whole_vectors_are_left_to_the_reference() -> None:
    reason = cpu_products.unsupported_reason(Scheme(2, group_size=28), 40, 96)
    assert reason is not None
    assert "groups of 28" in reason


@pytest.mark.parametrize("error", [RuntimeError("Ninja is required"), PermissionError(13, "Permission denied")])
def test_what_cannot_be_built_is_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setenv("PTQ_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "_build", fail)
    sources = ("cpu_ops.cpp",)
    with pytest.warns(UserWarning, match=f"could not be built.*{'Ninja' if 'Ninja' in str(error) else 'denied'}"):
        reason = extension.load_operators(f"ptq_test_{type(error).__name__}", sources)
    assert reason is not None
    assert extension.load_operators(f"ptq_test_{type(error).__name__}", sources) == reason  # and no second warning


@pytest.mark.parametrize("rotation", [{"block": 256}, {"block": 32, "kind": "hadamard-unsigned"}, {"seed": 3}])
@pytest.mark.parametrize("columns", [300, 320])
def test_inputs_are_rotated_inside(rotation: dict[str, object], columns: int, vectors: str) -> None:
    scheme = Scheme(4, group_size=64, scale_dtype="float16", input_rotation=rotation)  # type: ignore[arg-type]
    weight = packed(scheme, 20, columns)
    assert weight is not None
    unrotated = dataclasses.replace(weight, rotated=False)
    for batch in (1, 5, cpu_products._LARGE_BATCH):
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
        slow = InputRotation.of(weight.scheme.input_rotation, columns)(x.double()) @ whole(weight).double().T  # type: ignore[arg-type]
        for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
            got = cpu_products.product(x.to(dtype), unrotated, None)
            assert got.dtype == dtype
            assert (got.double() - slow).norm() <= near * slow.norm()

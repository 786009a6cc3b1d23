"""The CUDA kernels' order of weights, decoded as their lanes do: the same weight; products on a card that has them."""

from __future__ import annotations

import pytest
import torch

from ptq.errors import UsageError
from ptq.runtime import cuda_products
from ptq.runtime.cuda_products import CUDA_PRODUCTS
from ptq.runtime.dispatch import KERNELS, PackedWeight
from ptq.scheme import Scheme
from ptq.transforms.hadamard import InputRotation
from tests.ptq.runtime import cuda_model
from tests.ptq.runtime.test_cpu_products import packed, whole

SCHEMES = [
    *(Scheme(bits, group_size=64, scale_dtype="float16") for bits in (2, 3, 4, 8)),
    *(Scheme(bits, symmetric=False, group_size=32, scale_dtype="bfloat16") for bits in (2, 3, 4, 8)),
    Scheme(3, symmetric=False, group_size=None, scale_dtype="float16"),
    Scheme(4, symmetric=False, group_size=96, scale_dtype="float16"),
    Scheme(4, group_size=256, scale_dtype="float16"),
    Scheme.of("itq3s"),
]


def made(scheme: Scheme, rows: int, columns: int) -> PackedWeight:
    weight = packed(scheme, rows, columns)
    assert weight is not None
    return PackedWeight(weight.tensors, scheme, rows, columns, cuda_products.prepare(weight), rotated=True)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("shape", [(37, 640), (5, 300)])
def test_lanes_decode_the_weight(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = made(scheme, *shape)
    dense = cuda_model.dense(weight.prepared, *shape)
    torch.testing.assert_close(dense, whole(weight).double(), rtol=1e-6, atol=1e-28)
    stored = weight.prepared.codes.numel() * 4
    units = -(-shape[0] // 16) * -(-shape[1] // 256)
    assert stored == units * 16 * 256 * scheme.bits // 8  # the bytes of the codes, filled up to units


def test_integers_for_activations_cost_what_is_stated() -> None:
    weight = made(Scheme(4, group_size=64, scale_dtype="float16"), 64, 1024)
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ whole(weight).double().T
    for bits, most in ((16, 6e-5), (8, 1.2e-2)):
        error = (cuda_model.rounded(x, bits) @ whole(weight).double().T - exact).norm() / exact.norm()
        assert most / 100 < error < most


def test_signs_of_the_rotation_are_bits() -> None:
    weight = made(Scheme.of("itq3s"), 16, 512)
    rotation = InputRotation.of(weight.scheme.input_rotation, 512)  # type: ignore[arg-type]
    assert torch.equal(cuda_products._plus_minus(weight.prepared.signs), rotation.signs.float())
    assert made(Scheme.of("itq3s"), 16, 320).prepared.signs is None  # its last block is shorter


def test_it_stands_in_the_table_and_refuses_what_it_does_not_read() -> None:
    assert CUDA_PRODUCTS in KERNELS
    assert "5 bits" in (cuda_products.unsupported_reason(Scheme(5), 64, 64) or "")
    assert "multiple of 32" in (cuda_products.unsupported_reason(Scheme(4, group_size=48), 64, 96) or "")
    assert "cuda" in (CUDA_PRODUCTS.refusal("cpu", torch.bfloat16, Scheme(4), 64, 64) or "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_products_on_a_card(scheme: Scheme) -> None:
    if cuda_products._missing(torch.cuda.current_device()) is not None:
        pytest.skip("the kernels cannot be built here")
    weight = packed(scheme, 70, 640)
    assert weight is not None
    on_card = PackedWeight({k: t.cuda() for k, t in weight.tensors.items()}, scheme, 70, 640)
    ready = PackedWeight(on_card.tensors, scheme, 70, 640, cuda_products.prepare(on_card), rotated=True)
    assert (cuda_products.dequantized(ready, torch.bfloat16).cpu() - whole(weight).bfloat16()).abs().max() < 1e-25
    bias = torch.randn(70)
    for batch, near in ((1, 4e-3), (4, 4e-3), (7, 1.5e-2), (16, 1.5e-2), (80, 6e-3)):
        x = torch.randn(batch, 640, generator=torch.Generator().manual_seed(batch)).bfloat16()
        slow = x.double() @ whole(weight).double().T + bias.bfloat16().double()
        got = cuda_products.product(x.cuda(), ready, bias.cuda()).cpu().double()
        assert (got - slow).norm() < near * slow.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("shape", [(37, 640), (5, 300), (16, 256), (3, 96)])
def test_the_order_gives_the_checkpoint_back(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = made(scheme, *shape)
    restored = cuda_products.restore(weight)
    assert restored.keys() | {"weight_shape"} == weight.tensors.keys()
    for key, tensor in restored.items():
        stored = weight.tensors[key]
        assert tensor.dtype == stored.dtype
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
        assert torch.equal(tensor.view(bits), stored.view(bits)), key


@pytest.mark.parametrize(
    ("asked", "format", "parts"),
    [("", 4, [4, 4, 2]), ("8", 4, [10]), ("16", 4, [4, 4, 2]), ("", 0, [10]), ("16", 0, [4, 4, 2])],
)
def test_inputs_that_are_not_rotated_keep_16_bits(
    asked: str, format: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_INPUT_BITS", asked)
    assert [len(part) for part in cuda_products._parts(torch.zeros(10, 8), format)] == parts


def test_other_input_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ_INPUT_BITS", "4")
    with pytest.raises(UsageError, match="PTQ_INPUT_BITS is '4'"):
        cuda_products._parts(torch.zeros(10, 8), 4)

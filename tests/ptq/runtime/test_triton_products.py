"""The Triton kernels in Triton's interpreter, on the CPU, against the reference; what they refuse; where they stand."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import pytest
import torch

from ptq.runtime import triton_kernels, triton_products
from ptq.runtime.dispatch import KERNELS, REFERENCE
from ptq.runtime.triton_products import TRITON_PRODUCTS
from ptq.scheme import Scheme
from tests.ptq.runtime.test_cpu_products import packed, whole

SCHEMES = [
    *(Scheme(bits, group_size=64, scale_dtype="float16") for bits in (2, 3, 4, 8)),
    *(Scheme(bits, symmetric=False, group_size=32, scale_dtype="float16") for bits in (3, 4, 8)),
    Scheme(3, symmetric=False, group_size=None, scale_dtype="float16"),
    Scheme(4, group_size=256, scale_dtype="float16"),
    Scheme.of("itq3s"),
]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not triton_kernels.has_triton():
        pytest.skip("Triton is not installed")
    language = sys.modules.get("triton.language")
    if language is not None and type(language.zeros).__name__ == "JITFunction":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1: its own functions are compiled")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for made in (triton_kernels.uniform_kernel, triton_kernels.blocks_kernel):
        made.cache_clear()
    yield
    for made in (triton_kernels.uniform_kernel, triton_kernels.blocks_kernel):
        made.cache_clear()


@pytest.mark.filterwarnings("ignore")  # of numpy, in the interpreter
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("shape", [(37, 512), (5, 300)])
def test_products_are_the_references(scheme: Scheme, shape: tuple[int, int], interpreter: None) -> None:
    if scheme.format == "itq3s" and shape[1] % 256:
        pytest.skip("the kernel refuses the shape")
    weight = packed(scheme, *shape)
    assert weight is not None
    ready = dataclasses.replace(weight, prepared=triton_products.prepare(weight))
    bias = torch.randn(shape[0]).half()
    for vectors in (1, 5, 40):
        x = torch.randn(vectors, shape[1], generator=torch.Generator().manual_seed(vectors)).half()
        if scheme.format == "itq3s":
            got = triton_products._blocks(x, weight.tensors["weight_packed"], bias)
        else:
            tensors = weight.tensors
            group = scheme.group_size or shape[1]
            scale = tensors["weight_scale"]
            got = triton_products._uniform(x, tensors["weight_packed"], scale, ready.prepared, bias, scheme.bits, group)
        slow = x.double() @ whole(weight).half().double().T + bias.double()
        assert (got.double() - slow).norm() < 1e-3 * slow.norm()


def test_it_stands_behind_the_cuda_kernels_and_refuses_what_it_does_not_read() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert names.index("cuda") < names.index("triton") < names.index("reference")
    refuse = triton_products.unsupported_reason
    assert "5 bits" in (refuse(Scheme(5), 64, 64) or "")
    assert "groups of 96" in (refuse(Scheme(4, group_size=96), 64, 192) or "")
    assert "multiple of 256" in (refuse(Scheme.of("itq3s"), 64, 300) or "")
    assert "cuda" in (TRITON_PRODUCTS.refusal("cpu", torch.bfloat16, Scheme(4), 64, 64) or "")


def test_many_vectors_are_the_references() -> None:
    weight = packed(SCHEMES[0], 16, 128)
    assert weight is not None
    x = torch.randn(65, 128)
    assert torch.equal(triton_products.product(x, weight, None), REFERENCE.product(x, weight, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_products_on_a_card(scheme: Scheme) -> None:
    if triton_products._missing() is not None:
        pytest.skip(f"no Triton kernels here: {triton_products._missing()}")
    weight = packed(scheme, 70, 768)
    assert weight is not None
    on_card = dataclasses.replace(weight, tensors={key: tensor.cuda() for key, tensor in weight.tensors.items()})
    ready = dataclasses.replace(on_card, prepared=triton_products.prepare(on_card))
    for vectors in (1, 7, 16, 64, 80):
        x = torch.randn(2, vectors, 768, generator=torch.Generator().manual_seed(vectors)).bfloat16()[:1]
        slow = x.double() @ whole(weight).bfloat16().double().T
        got = triton_products.product(x.cuda(), ready, None).cpu().double()
        assert (got - slow).norm() < 6e-3 * slow.norm()

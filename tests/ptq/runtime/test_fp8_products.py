"""Native FP8 products: the same codes as the reference, on this machine's ``torch._scaled_mm`` where it can."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from ptq.activation_formats.hardware import SMALLEST_SCALE, quantize_tokens_fp8
from ptq.grids.floating_point import E4M3
from ptq.quantized import QuantizedWeight
from ptq.runtime import fp8_products
from ptq.runtime.dispatch import KERNELS, REFERENCE, PackedWeight, choose
from ptq.runtime.fp8_products import FP8_PRODUCTS, product, unsupported_reason
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme


def layer(number: str, inputs: str, device: str = "cpu") -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    scheme = Scheme.of(number, act_format=inputs, scale_dtype="bfloat16")
    record, given = scheme.number_format, scheme.activation_format
    assert given is not None
    grid = record.grid(record.fit(weight, scheme, "minmax"), scheme, 64)
    quantized = QuantizedWeight.from_grid(grid.round(weight), grid, scheme)
    quantized = dataclasses.replace(quantized, input_params=given.fit(torch.full((64,), 4.0)))
    return QuantLinear.from_quantized(quantized.to(device), torch.randn(48, generator=generator).to(device))


def test_it_stands_in_the_table_and_is_not_taken_on_a_cpu() -> None:
    assert FP8_PRODUCTS in KERNELS
    scheme = Scheme.of("fp8", act_format="fp8", scale_dtype="bfloat16")
    assert choose("cpu", torch.bfloat16, scheme, 48, 64) is REFERENCE
    assert "not rounded to FP8" in (unsupported_reason(Scheme.of("fp8"), 48, 64) or "")
    assert "multiples of 16" in (unsupported_reason(scheme, 40, 64) or "")


@pytest.mark.parametrize("number", ["fp8", "fp8-tensor"])
@pytest.mark.parametrize("inputs", ["fp8", "fp8-tensor"])
def test_products_of_codes_are_the_reference_but_for_rounding(
    number: str, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product is written out, so that the codes, scales and layout that are handed over are what is tested."""

    def scaled(a, b, *, scale_a, scale_b, bias, out_dtype):  # type: ignore[no-untyped-def]  # torch._scaled_mm
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert scale_a.shape == (len(a), 1)
        assert scale_b.shape == (1, b.shape[1])
        return ((a.float() * scale_a) @ (b.float() * scale_b) + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(fp8_products, "_quantizer", lambda: quantize_tokens_fp8)
    linear = layer(number, inputs)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    names = ("weight_packed", "weight_scale", *linear.scheme.input_specs(64))
    packed = PackedWeight({name: linear.get_buffer(name) for name in names}, linear.scheme, 48, 64)
    torch.testing.assert_close(product(x, packed, linear.bias), linear(x), rtol=2e-2, atol=0.1)
    assert linear.kernel_name(x) == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inputs", ["fp8", "fp8-tensor"])
def test_the_gpu_multiplies_natively(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.delenv("PTQ_KERNEL", raising=False)
    linear = layer("fp8", inputs, "cuda")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    assert linear.kernel_name(x) == "fp8"
    native = linear(x)
    monkeypatch.setenv("PTQ_KERNEL", "reference")
    torch.testing.assert_close(native, linear(x), rtol=2e-2, atol=0.1)


def test_without_triton_the_formula_quantizes_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ptq.runtime.fp8_quantizer", None)
    fp8_products._quantizer.cache_clear()
    with pytest.warns(UserWarning, match="without Triton"):
        assert fp8_products._quantizer() is quantize_tokens_fp8
    fp8_products._quantizer.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [16, 100, 4096, 9000])
def test_the_fused_quantizer_gives_the_codes_of_the_formula_on_a_gpu(width: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    from ptq.runtime.fp8_quantizer import quantize_rows

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, width, generator=generator) * torch.logspace(-30, 30, 37)[:, None]
    x[3] = 0
    x[4, 5], x[5, 6] = torch.inf, torch.nan
    for dtype in (torch.bfloat16, torch.float32):
        given = x.to("cuda", dtype)
        codes, scale = quantize_rows(given, E4M3.maximum, SMALLEST_SCALE)
        expected, expected_scale = quantize_tokens_fp8(given)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(codes.float(), expected.float(), rtol=0, atol=0, equal_nan=True)

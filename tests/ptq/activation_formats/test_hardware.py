"""Activations in the formats of hardware, against the fake quantization of compressed-tensors on the same numbers."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from ptq.activation_formats import ACTIVATION_FORMATS, find_activation_format
from ptq.activation_formats.hardware import quantize_tokens_fp8
from ptq.errors import UsageError

PRESETS = {
    "nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK",
    "int8": "W8A8", "fp8-tensor": "FP8",
}  # fmt: skip


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens and channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(torch.randn(shape[-1], generator=generator)) * (1 + torch.arange(shape[-2])[:, None])


def test_every_format_has_an_independent_truth() -> None:
    assert PRESETS.keys() <= ACTIVATION_FORMATS.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_compressed_tensors(name: str, seed: int) -> None:
    record, x = find_activation_format(name), activations(2, 7, 256, seed=seed)
    args = preset_name_to_scheme(PRESETS[name], ["Linear"]).input_activations
    assert args is not None
    params = record.fit(x.abs().amax((0, 1)))
    if name == "fp8-tensor":
        scale, zero, tensor_scale = params["input_scale"], None, None
    else:
        tensor_scale = params.get("input_global_scale")
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=tensor_scale)
    wanted = fake_quantize(x, scale, zero, args, global_scale=tensor_scale)
    assert torch.equal(record.round(x, params), wanted)
    assert not torch.equal(wanted, x)


def test_in_bfloat16_the_library_differs_by_nothing_but_the_dtype_of_its_scales() -> None:
    """It divides the largest magnitude of a block by 6 in the input's dtype, we in float32."""
    record, x = find_activation_format("nvfp4"), activations(2, 7, 256).to(torch.bfloat16)
    args = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    assert args is not None
    params = record.fit(x.float().abs().amax((0, 1)))
    tensor_scale = params["input_global_scale"]
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        scale, zero = compute_dynamic_scales_and_zp(x.to(dtype), args, torch.nn.Module(), global_scale=tensor_scale)
        values[dtype] = fake_quantize(x, scale, zero, args, global_scale=tensor_scale)
    assert torch.equal(record.round(x, params), values[torch.float32])
    assert 0 < (values[torch.bfloat16] != values[torch.float32]).float().mean() < 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_rounded_again_stays(name: str) -> None:
    """All but the formats whose scale moves with the rounded largest value."""
    record, x = find_activation_format(name), activations(5, 128)
    params = record.fit(x.abs().amax(0))
    once = record.round(x, params)
    torch.testing.assert_close(record.round(once, params), once, rtol=2e-2, atol=1e-6)
    assert record.round(torch.zeros(3, 128), params).abs().max() == 0
    assert record.round(x.to(torch.bfloat16), params).dtype == torch.bfloat16
    assert {key: (tuple(v.shape), v.dtype) for key, v in params.items()} == record.tensor_specs(128)
    assert record.static == bool(params)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(name: str, wrong: float) -> None:
    record, x = find_activation_format(name), activations(4, 256)
    params = record.fit(x.abs().amax(0))
    x[1, 5] = wrong
    rounded = record.round(x, params)
    if record.static and wrong == float("inf"):
        assert bool(torch.isfinite(rounded).all())  # a fixed range saturates
    else:
        assert not bool(torch.isfinite(rounded[1]).all())
    assert bool(torch.isfinite(rounded[[0, 2, 3]]).all())


def test_gradients_go_straight_through() -> None:
    record, x = find_activation_format("mxfp4"), activations(4, 64).requires_grad_()
    record.quantize(x, {}).square().sum().backward()
    with torch.no_grad():
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * record.round(x, {}))


def test_codes_for_native_products_are_the_same_values() -> None:
    x = activations(6, 64)
    codes, scale = quantize_tokens_fp8(x)
    assert torch.equal(codes.float() * scale, find_activation_format("fp8").round(x, {}))


def test_widths_and_names() -> None:
    assert find_activation_format("fp8").unsupported_reason(30) is None
    reason = find_activation_format("nvfp4").unsupported_reason(24)
    assert reason is not None
    assert "24 channels" in reason
    assert "multiples of 16" in reason
    with pytest.raises(UsageError, match="nvfp4"):
        find_activation_format("nvfp5")

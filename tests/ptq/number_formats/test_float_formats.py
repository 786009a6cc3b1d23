"""Floating-point number formats against compressed-tensors' own compressors and test vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from ptq.errors import NumericalError, OutputError, UsageError
from ptq.number_formats import FORMATS
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme

NAMES = ("fp4", "e2m1", "e3m0", "e1m2", "nvfp4", "mxfp4", "mxfp8", "fp8", "fp8-tensor", "fp8-block")
STORED = {  # preset and storage of compressed-tensors
    "nvfp4": ("NVFP4", "nvfp4-pack-quantized"),
    "mxfp4": ("MXFP4", "mxfp4-pack-quantized"),
    "mxfp8": ("MXFP8", "mxfp8-quantized"),
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "fp8-tensor": ("FP8", "float-quantized"),
    "fp8-block": ("FP8_BLOCK", "float-quantized"),
    "int8": ("W8A8", "int-quantized"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(name: str, weight: torch.Tensor, search: str = "minmax") -> QuantizedWeight:
    scheme = Scheme.of(name).resolved(torch.bfloat16)
    record = scheme.number_format
    grid = record.grid(record.fit(weight, scheme, search), scheme, weight.shape[1])  # type: ignore[arg-type]
    return QuantizedWeight.from_grid(grid.round(weight), grid, scheme)


def minifloat(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Values of codes by the definition: (-1)^s 2^(max(e, 1) - bias) (m / 2^M, and 1 more where e > 0)."""
    codes = codes.astype(np.int64)
    mantissa = codes & (2**mantissa_bits - 1)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    sign = 1.0 - 2.0 * (codes >> (exponent_bits + mantissa_bits))
    significand = mantissa / 2.0**mantissa_bits + (exponent > 0)
    return sign * significand * 2.0 ** (np.maximum(exponent, 1) - (2 ** (exponent_bits - 1) - 1))


@pytest.mark.parametrize("name", STORED)
def test_stored_bytes_are_the_weights_by_the_definitions_of_the_formats(name: str) -> None:
    """None of ptq's code, nor a library's, reads the stored bytes here."""
    ours = quantized(name, random(136, 256, seed=3))
    tensors = {key: value.contiguous() for key, value in ours.tensors().items()}
    packed = tensors["weight_packed"].view(torch.uint8).numpy()
    if name.endswith("fp4"):
        low_first = np.stack([packed & 15, packed >> 4], axis=-1).reshape(136, 256)
        numbers = minifloat(low_first, 2, 1)
    elif name == "int8":
        numbers = packed.view(np.int8).astype(np.float64)
    else:
        numbers = minifloat(packed, 4, 3)
    scale = tensors["weight_scale"]
    if name == "nvfp4":
        factor = minifloat(scale.view(torch.uint8).numpy(), 4, 3) / tensors["weight_global_scale"].numpy()
    elif name.startswith("mx"):
        factor = 2.0 ** (scale.numpy().astype(np.float64) - 127)
    else:
        factor = scale.double().numpy().reshape(-1, 1 if name != "fp8-block" else scale.shape[1])
    height, width = (128, 128) if name == "fp8-block" else (-(-136 // len(factor)), 256 // factor.shape[1])
    spread = np.repeat(np.repeat(factor, height, 0)[:136], width, 1)
    np.testing.assert_allclose(ours.dequantize().numpy(), numbers * spread, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", STORED)
def test_values_and_bytes_are_those_of_compressed_tensors(name: str) -> None:
    """The library compresses the same scales to the same bytes, and reads our bytes as the same values."""
    weight = random(136, 256)
    ours = quantized(name, weight)
    preset, storage = STORED[name]
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    library = BaseCompressor.get_value_from_registry(storage)
    tensors = ours.tensors()
    scale = tensors["weight_scale"].float()
    if scheme.weights is not None and scheme.weights.scale_dtype == torch.uint8:
        scale = torch.exp2(scale - 127)
    state = {"weight": weight, "weight_scale": scale}
    if name == "nvfp4":
        state["weight_global_scale"] = tensors["weight_global_scale"]
    theirs = library.compress(state, scheme)
    packed = theirs.get("weight_packed", theirs.get("weight"))
    assert packed.dtype == tensors["weight_packed"].dtype
    different = packed.view(torch.uint8) != tensors["weight_packed"].view(torch.uint8)
    values = ours.dequantize()
    if "weight" in theirs:  # minus zero is theirs alone
        assert bool((packed.float()[different] == tensors["weight_packed"].float()[different]).all())
    else:
        merged = {**theirs, "weight_packed": packed}
        again = library.decompress(merged, scheme)["weight"]
        assert torch.equal(again.float(), values.to(again.dtype).float())
    read = dict(tensors)
    if "weight" in theirs:
        read["weight"] = read.pop("weight_packed")
    decompressed = library.decompress(read, scheme)["weight"]
    assert torch.equal(decompressed.float(), ours.dequantize(decompressed.dtype).float())


@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back_and_rows_are_rows(name: str) -> None:
    record = FORMATS[name]
    for search in record.searches:
        if search == "hessian":
            continue
        weight = quantized(name, random(136, 256, seed=1), search)
        tensors = weight.tensors()
        back = QuantizedWeight.from_tensors(tensors, weight.scheme, weight.shape)
        assert torch.equal(back.codes, weight.codes)
        assert all(torch.equal(back.params[key].float(), value.float()) for key, value in weight.params.items())
        rows = record.dequantize_rows(tensors, weight.scheme, slice(5, 131), *weight.shape)
        assert torch.equal(rows, weight.dequantize()[5:131])
        stored = sum(8 * t.numel() * t.itemsize for key, t in tensors.items() if key != "weight_shape")
        assert record.payload_bits(136, 256, weight.scheme) == stored


def test_nibbles_of_the_notes() -> None:
    """0.5, -6, 3, -0.0 are the codes 1, 15, 5, 8 and the bytes F1 85, the even channel in the low nibble; the last one
    is read as zero."""
    scheme = Scheme.of("mxfp4")
    packed = torch.tensor([[0xF1, 0x85] + [0] * 14], dtype=torch.uint8)
    tensors = {"weight_packed": packed, "weight_scale": torch.tensor([[127]], dtype=torch.uint8)}
    weight = QuantizedWeight.from_tensors(tensors, scheme, (1, 32))
    assert weight.dequantize()[0, :5].tolist() == [0.5, -6.0, 3.0, 0.0, 0.0]
    assert weight.tensors()["weight_packed"][0, :2].tolist() == [0xF1, 0x05]


def test_the_tensor_scale_is_shared_by_a_group() -> None:
    large, small, scheme = random(32, 64), 0.1 * random(16, 64, seed=1), Scheme.of("nvfp4")
    record = scheme.number_format
    shared = record.share([small, large], scheme)
    fits = [record.fit(weight, scheme, "minmax", None, shared) for weight in (large, small)]
    assert torch.equal(fits[0]["global_scale"], fits[1]["global_scale"])
    alone = record.fit(small, scheme, "minmax")
    assert not torch.equal(alone["global_scale"], fits[1]["global_scale"])
    assert record.share([], scheme) == {}


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name: str) -> None:
    record, scheme = FORMATS[name], Scheme.of(name)
    with pytest.raises(UsageError, match="bits"):
        Scheme.of(name, bits=5)
    with pytest.raises(UsageError, match=r"symmetric|zero points"):
        Scheme.of(name, symmetric=False)
    with pytest.raises(UsageError, match="scale search"):
        record.fit(random(128, 128), scheme, "best")  # type: ignore[arg-type]
    weight = random(128, 128)
    weight[3, 7] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        record.fit(weight, scheme, "minmax")


@pytest.mark.parametrize(("name", "multiple"), [("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)])
def test_widths_that_are_no_multiple_of_a_block(name: str, multiple: int) -> None:
    scheme = Scheme.of(name)
    reason = scheme.number_format.unsupported_reason(64, multiple + 1, scheme)
    assert reason is not None
    assert f"{multiple + 1} input channels" in reason
    assert f"{multiple} wide" in reason
    assert scheme.number_format.unsupported_reason(64, 2 * multiple, scheme) is None


def test_a_damaged_exponent_and_a_damaged_number_are_refused() -> None:
    tensors = quantized("mxfp8", random(8, 32)).tensors()
    damaged = tensors | {"weight_scale": torch.full((8, 1), 255, dtype=torch.uint8)}
    with pytest.raises(OutputError, match="255"):
        QuantizedWeight.from_tensors(damaged, Scheme.of("mxfp8"), (8, 32))
    damaged = tensors | {"weight_packed": torch.full((8, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}
    with pytest.raises(OutputError, match="NaN"):
        QuantizedWeight.from_tensors(damaged, Scheme.of("mxfp8"), (8, 32))

"""Activations in the formats that GPUs multiply: NVFP4, MXFP4, MXFP8, FP8 and INT8, as compressed-tensors defines them.

Only comparisons, correctly rounded divisions and products with powers of two decide a code, so that a CPU and a GPU
give the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.activation_formats.base import ActivationFormat, TensorSpec
from ptq.grids.block_scales import block_exponents, divided, exponent_scales, global_scale
from ptq.grids.floating_point import E2M1, E4M3, FloatFormat

__all__ = [
    "SMALLEST_SCALE",
    "BlockFp8",
    "MxActivations",
    "Nvfp4Activations",
    "TensorFp8",
    "TokenFp8",
    "TokenInt8",
    "quantize_tokens_fp8",
    "quantize_with_fp8",
]

_SMALLEST_E4M3 = 2.0**-9
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a token of zeros: 0 / tiny is 0, where 0 / 0 is not


class Nvfp4Activations(ActivationFormat):
    """E2M1 in blocks of 16 whose E4M3 scales are found at run time, under a tensor scale from calibration."""

    name, bits, block = "nvfp4", 4, 16
    summary = "E2M1 in blocks of 16 with E4M3 scales, tensor scale from calibration"

    def tensor_specs(self, in_features: int) -> dict[str, TensorSpec]:
        return {"input_global_scale": ((1,), torch.float32)}

    def fit(self, largest: Tensor) -> dict[str, Tensor]:
        return {"input_global_scale": global_scale(largest.max(), "minmax")}

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        blocks = _blocks(x, 16)
        tensor_scale = params["input_global_scale"]
        scale = E4M3.round(divided(blocks.abs().amax(-1, keepdim=True), E2M1.maximum) * tensor_scale)
        return _rounded(blocks, scale.clamp(min=_SMALLEST_E4M3) / tensor_scale, E2M1, x)


class MxActivations(ActivationFormat):
    """Blocks of 32 with an exponent each, found at run time by the rule ``even`` of compressed-tensors."""

    block = 32

    def __init__(self, name: str, number: FloatFormat) -> None:
        self.name, self.bits, self._number = name, number.bits, number
        self.summary = f"{number.name.upper()} in blocks of 32 with exponents of 8 bits, per block at run time"

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        blocks = _blocks(x, 32)
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = exponent_scales(block_exponents(largest, self._number, "even"))
        return _rounded(blocks, torch.where(torch.isfinite(largest), scale, torch.nan), self._number, x)


class BlockFp8(ActivationFormat):
    """E4M3 in blocks of 128 channels with float32 scales, found at run time."""

    name, bits, block = "fp8-block", 8, 128
    summary = "E4M3 in blocks of 128 with float32 scales, per block at run time"

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        blocks = _blocks(x, 128)
        return _rounded(blocks, _range(blocks, E4M3.maximum), E4M3, x)


class TokenFp8(ActivationFormat):
    """E4M3 with a float32 scale per token, found at run time."""

    name, bits = "fp8", 8
    summary = "E4M3 with a scale per token, at run time"

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        wide = x.float()
        return _rounded(wide, _range(wide, E4M3.maximum), E4M3, x)


class TensorFp8(ActivationFormat):
    """E4M3 with one scale for all tokens, from calibration."""

    name, bits = "fp8-tensor", 8
    summary = "E4M3 with one scale from calibration"

    def tensor_specs(self, in_features: int) -> dict[str, TensorSpec]:
        return {"input_scale": ((1,), torch.float32)}

    def fit(self, largest: Tensor) -> dict[str, Tensor]:
        return {"input_scale": divided(largest.max(), E4M3.maximum).clamp(min=SMALLEST_SCALE).reshape(1)}

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return _rounded(x.float(), params["input_scale"], E4M3, x)


class TokenInt8(ActivationFormat):
    """Integers from -128 to 127 with a scale per token, found at run time."""

    name, bits = "int8", 8
    summary = "integers of 8 bits with a scale per token, at run time"

    def round(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        wide = x.float()
        scale = _range(wide, 127.5)
        return (wide / scale).round_().clamp_(-128, 127).mul_(scale).to(x.dtype)


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8 E4M3 of the shape of ``x`` and scales float32 ``[..., 1]`` of `TokenFp8`, for native products."""
    wide = x.float()
    scale = _range(wide, E4M3.maximum)
    return E4M3.round(wide / scale).to(torch.float8_e4m3fn), scale


def quantize_with_fp8(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same for `TensorFp8`: codes, and its one scale ``[1]`` for every token, ``[..., 1]``."""
    codes = E4M3.round(x.float() / scale).to(torch.float8_e4m3fn)
    return codes, scale.expand(*x.shape[:-1], 1)


def _blocks(x: Tensor, size: int) -> Tensor:
    """``[..., in]`` as float32 ``[..., in / size, size]``."""
    return x.float().reshape(*x.shape[:-1], -1, size)


def _range(x: Tensor, top: float) -> Tensor:
    """The scale ``[..., 1]`` that brings the largest magnitude of the last dimension to ``top``."""
    return divided(x.abs().amax(-1, keepdim=True), top).clamp_(min=SMALLEST_SCALE)


def _rounded(values: Tensor, scale: Tensor, number: FloatFormat, like: Tensor) -> Tensor:
    return number.round(values / scale).mul_(scale).to(like.dtype).view(like.shape)

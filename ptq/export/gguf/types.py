"""From a quantized weight to the bytes of a GGUF type that holds exactly its values."""

from __future__ import annotations

from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ptq.errors import UsageError
from ptq.number_formats.gguf.base import GgufFormat
from ptq.number_formats.gguf.layout import pack_halves, to_planes
from ptq.packing.nibbles import unpack_nibbles
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme

__all__ = ["exact_type", "pack_q8_0", "row_bytes", "tensor_scale", "weight_bytes"]

_BLOCK = 32
_TERNARY_BLOCK = 256
_NVFP4_BLOCK = 64


def exact_type(name: str, scheme: Scheme, shape: tuple[int, int]) -> GGMLQuantizationType:
    """The type that holds a weight exactly.

    Raises:
        UsageError: there is none; says what to quantize to instead.
    """
    problem = _problem(scheme, shape[1])
    if problem is not None:
        raise UsageError(
            f"{name} ({scheme.describe()}, {shape[0]} x {shape[1]}) cannot be stored in a GGUF file without rounding "
            f"it again: {problem}. What can: --format q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, mxfp4, nvfp4; symmetric "
            "integers of 2 to 8 bits with --group-size 32 or a multiple of it. Quantize again with one of these."
        )
    if isinstance(scheme.number_format, GgufFormat):
        return GGMLQuantizationType[scheme.format.upper()]
    if scheme.format in ("mxfp4", "nvfp4"):
        return GGMLQuantizationType[scheme.format.upper()]
    size = shape[1] if scheme.group_size is None else scheme.group_size
    if scheme.bits == 2 and size % _TERNARY_BLOCK == 0:
        return GGMLQuantizationType.TQ2_0
    return {4: GGMLQuantizationType.Q4_0, 5: GGMLQuantizationType.Q5_0}.get(
        max(scheme.bits, 4), GGMLQuantizationType.Q8_0
    )


def _problem(scheme: Scheme, width: int) -> str | None:
    if scheme.input_rotation is not None:
        return "its input is rotated at run time, which only ptq does"
    if isinstance(scheme.number_format, GgufFormat) or scheme.format == "mxfp4":
        return None
    if scheme.format == "nvfp4":
        return f"its blocks there are {_NVFP4_BLOCK} weights" if width % _NVFP4_BLOCK else None
    if scheme.format != "int":
        return f"there is no type with the values of {scheme.format}"
    if not scheme.symmetric:
        return "types with zero points round the product of scale and zero point to float16"
    if width % _BLOCK or (scheme.group_size is not None and scheme.group_size % _BLOCK):
        return f"scales belong to {_BLOCK} weights there"
    return None


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of a row."""
    block, size = GGML_QUANT_SIZES[kind]
    return width // block * size


def weight_bytes(name: str, weight: QuantizedWeight, kind: GGMLQuantizationType) -> Tensor:
    """The weight as uint8 ``[out, row_bytes]``.

    Raises:
        UsageError: a scale that float16 does not hold.
    """
    scheme = weight.scheme
    if isinstance(scheme.number_format, GgufFormat):
        return scheme.number_format.pack(weight.codes, weight.params, scheme)["weight_packed"]
    if kind == GGMLQuantizationType.MXFP4:
        return _mxfp4(weight)
    if kind == GGMLQuantizationType.NVFP4:
        return _nvfp4(weight)
    scale = _half_scales(name, weight.params["scale"])
    rows, width = weight.shape
    block = _TERNARY_BLOCK if kind == GGMLQuantizationType.TQ2_0 else _BLOCK
    size = width if scheme.group_size is None else scheme.group_size
    per_block = scale.repeat_interleave(size // block, 1)[:, : width // block].reshape(-1)
    signed = (weight.codes.to(torch.int16) - 2 ** (scheme.bits - 1)).reshape(-1, block)  # [blocks, block]
    packed: Tensor = _PACKERS[kind](signed, per_block)
    return packed.reshape(rows, -1)


def _half_scales(name: str, scale: Tensor) -> Tensor:
    stored = scale.to(torch.float16)
    if not torch.equal(stored.float(), scale.float()):
        raise UsageError(
            f"{name} has scales that float16 does not hold exactly, and GGUF stores float16: quantize again with "
            "--scale-dtype float16."
        )
    return stored


def _q4_0(signed: Tensor, scale: Tensor) -> Tensor:
    return torch.cat((pack_halves(scale), to_planes((signed + 8).to(torch.uint8), 4, _BLOCK)), 1)


def _q5_0(signed: Tensor, scale: Tensor) -> Tensor:
    codes = (signed + 16).to(torch.uint8)
    high = (codes >> 4).view(-1, 4, 8).to(torch.int16) << torch.arange(8, dtype=torch.int16)  # bit j is weight j
    return torch.cat((pack_halves(scale), high.sum(2).to(torch.uint8), to_planes(codes & 15, 4, _BLOCK)), 1)


def _q8_0(signed: Tensor, scale: Tensor) -> Tensor:
    return torch.cat((pack_halves(scale), signed.to(torch.int8).view(torch.uint8)), 1)


def _tq2_0(signed: Tensor, scale: Tensor) -> Tensor:
    # The type has -1, 0, 1, 2 times a scale, ours -2, -1, 0, 1: the scale changes its sign.
    return torch.cat((to_planes((1 - signed).to(torch.uint8), 2, 128), pack_halves(-scale)), 1)


_PACKERS: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.TQ2_0: _tq2_0,
}


def _mxfp4(weight: QuantizedWeight) -> Tensor:
    """The exponent, then 16 bytes: number j in the low nibble, number 16 + j in the high one."""
    rows, width = weight.shape
    stored = weight.tensors()
    patterns = unpack_nibbles(stored["weight_packed"], width).reshape(-1, _BLOCK)
    exponents = stored["weight_scale"].reshape(-1, 1)
    return torch.cat((exponents, to_planes(patterns, 4, _BLOCK)), 1).reshape(rows, -1)


def _nvfp4(weight: QuantizedWeight) -> Tensor:
    """Four E4M3 scales, then eight bytes for each of their 16 numbers: j in the low nibble of byte j, 8 + j in the
    high one. The scale of the tensor is no part of it (`tensor_scale`)."""
    rows, width = weight.shape
    stored = weight.tensors()
    patterns = unpack_nibbles(stored["weight_packed"], width).reshape(-1, 16)
    scales = stored["weight_scale"].view(torch.uint8).reshape(-1, 4)
    numbers = to_planes(patterns, 4, 16).reshape(-1, _NVFP4_BLOCK // 2)
    return torch.cat((scales, numbers), 1).reshape(rows, -1)


def tensor_scale(weight: QuantizedWeight) -> Tensor | None:
    """What llama.cpp multiplies the product with the weight by, float32 ``[1]``; ``None`` where nothing is."""
    if weight.scheme.format != "nvfp4":
        return None
    return weight.params["global_scale"].float().reciprocal().reshape(1)


def pack_q8_0(values: Tensor) -> Tensor:
    """A matrix ``[rows, width]`` rounded to Q8_0, uint8: of embeddings, as llama.cpp rounds them."""
    blocks = values.float().reshape(-1, _BLOCK)
    scale = blocks.abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    signed = (blocks * inverse[:, None]).round_().to(torch.int16)
    return _q8_0(signed, scale.half()).reshape(len(values), -1)

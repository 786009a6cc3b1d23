"""GPTQ and AWQ checkpoints.

GPTQ: ``qweight`` int32 ``[in bits/32, out]``, codes as a little-endian bit stream along the input; ``qzeros`` int32
``[groups, out bits/32]``, likewise along the output; ``scales [groups, out]``; ``g_idx [in]``, the group of every input
channel (in order where it is absent). ``w = (u - z) s``. The first version of the format stores ``z - 1``
modulo ``2^bits``, ``gptq_v2`` stores ``z``.

AWQ, layout GEMM: ``qweight`` int32 ``[in, out/8]``, ``qzeros`` int32 ``[groups, out/8]``, ``scales [groups, out]``,
eight codes of 4 bits a word in the order of the output channels 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from calib.checkpoint.json import quoted
from calib.checkpoint.quantized.packed import PackedWeight, find, require_shape
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError

__all__ = ["awq_weights", "gptq_weights"]

_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of every output channel of a word
_QWEIGHT = ".qweight"


def gptq_weights(folder: str, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[PackedWeight]:
    """All weights of a GPTQ checkpoint.

    Args:
        folder: for messages.
        stored: the tensors in the files.
        config: the ``quantization_config``.

    Raises:
        ModelError: another layout than the two described above, other bits, tensors that are missing or do not fit.
    """
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ModelError(
            f"{folder} is a GPTQ checkpoint in the layout {layout!r}; ptq reads 'gptq' and 'gptq_v2'. Save it in one "
            "of these with the program that wrote it, or give the full-precision model."
        )
    meta = config.get("meta") or {}
    if not isinstance(meta, dict):
        raise ModelError(f"{folder} has a quantization_config whose meta is {quoted(meta)}, not an object.")
    quantizer = meta.get("quantizer") or []
    by_words = str(quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer).startswith("gptqmodel")
    offset = "none" if layout == "gptq_v2" else "words" if by_words else "codes"
    return [_gptq(name.removesuffix(_QWEIGHT), stored, config, offset) for name in stored if name.endswith(_QWEIGHT)]


def _gptq(prefix: str, stored: Mapping[str, StoredTensor], config: Mapping[str, Any], offset: str) -> PackedWeight:
    qweight, scales = find(stored, prefix, "qweight"), find(stored, prefix, "scales")
    order = find(stored, prefix, "g_idx") if f"{prefix}.g_idx" in stored else None
    words, out = _two(f"{prefix}.qweight", qweight)
    bits = config.get("bits")
    if config.get("dynamic") and order is not None:  # bits by linear: the shapes say which
        bits = 32 * words // order.shape[0] if order.shape[0] else None
    if bits not in _GPTQ_BITS:
        raise ModelError(f"{prefix} has GPTQ codes of {bits!r} bits; ptq reads {', '.join(map(str, _GPTQ_BITS))}.")
    width = order.shape[0] if order is not None else 32 * words // bits
    groups = _two(f"{prefix}.scales", scales)[0]
    why = f"GPTQ with {bits} bits of a linear of {out} x {width}"
    require_shape(f"{prefix}.qweight", qweight, (math.ceil(width * bits / 32), out), why)
    require_shape(f"{prefix}.scales", scales, (groups, out), why)
    zeros = find(stored, prefix, "qzeros")
    require_shape(f"{prefix}.qzeros", zeros, (groups, math.ceil(out * bits / 32)), why)
    size = _group_size(prefix, config.get("group_size", -1), width, groups, free=order is not None)
    parts = {role: f"{prefix}.{role}" for role in ("qweight", "qzeros", "scales")}
    if order is not None:
        parts["g_idx"] = f"{prefix}.g_idx"
    make = functools.partial(_dequantize_gptq, prefix, (out, width), bits, size, offset)
    return PackedWeight(f"{prefix}.weight", parts, (out, width), bits, make, _type(bits, width, groups))


def _two(name: str, stored: StoredTensor) -> tuple[int, int]:
    if len(stored.shape) != 2 or 0 in stored.shape:
        raise ModelError(f"{name} has the shape {list(stored.shape)} in {stored.file}, not two sizes.")
    return stored.shape[0], stored.shape[1]


def _group_size(prefix: str, stated: Any, width: int, groups: int, *, free: bool) -> int:
    """Input channels in a group; where ``free``, the order of groups is stored and need not be that of the config."""
    size = width if stated in (-1, None) else stated
    if type(size) is not int or size < 1 or (math.ceil(width / size) != groups and not free):
        raise ModelError(
            f"{prefix} has scales of {groups} groups for {width} channels, the config says group_size {stated!r}. Do "
            "config and weights belong together?"
        )
    return size


def _dequantize_gptq(
    prefix: str, shape: tuple[int, int], bits: int, size: int, offset: str, parts: Mapping[str, Tensor]
) -> Tensor:
    out, width = shape
    scales, qzeros = parts["scales"].float(), parts["qzeros"]  # [groups, out]
    if offset == "words" and bits != 3:  # GPTQModel takes 1 off every code by subtracting whole words, borrows included
        ones = sum(1 << place for place in range(0, 32, bits))
        qzeros, offset = (qzeros.long() + ones).to(torch.int32), "none"
    zeros = _codes(qzeros, bits, (len(scales), out), along=1)
    if offset != "none":
        zeros = (zeros + 1) % 2**bits
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(width) // size
    if not 0 <= int(group.min()) <= int(group.max()) < len(scales):
        raise ModelError(f"{prefix}.g_idx names groups {int(group.min())} to {int(group.max())} of {len(scales)}.")
    codes = _codes(parts["qweight"], bits, (width, out), along=0).float()
    return codes.sub_(zeros.float()[group]).mul_(scales[group]).T.contiguous()


def _codes(packed: Tensor, bits: int, shape: tuple[int, int], *, along: int) -> Tensor:
    """Unsigned codes int16 of this shape from a dense stream of words along a dimension."""
    signed = unpack_from_int32(packed, bits, torch.Size(shape), packed_dim=along)
    codes: Tensor = signed.to(torch.int16) + 2 ** (bits - 1)
    return codes


def awq_weights(folder: str, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[PackedWeight]:
    """All weights of an AWQ checkpoint; see `gptq_weights`."""
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ModelError(
            f"{folder} is an AWQ checkpoint of {bits!r} bits in the layout {version!r}; ptq reads 4 bits in 'gemm'. "
            "Give the full-precision model."
        )
    stated = config.get("group_size", config.get("q_group_size", -1))
    return [_awq(name.removesuffix(_QWEIGHT), stored, stated) for name in stored if name.endswith(_QWEIGHT)]


def _awq(prefix: str, stored: Mapping[str, StoredTensor], stated: Any) -> PackedWeight:
    qweight, scales = find(stored, prefix, "qweight"), find(stored, prefix, "scales")
    width, words = _two(f"{prefix}.qweight", qweight)
    groups, out = _two(f"{prefix}.scales", scales)[0], 8 * words
    why = f"AWQ of a linear of {out} x {width}"
    require_shape(f"{prefix}.scales", scales, (groups, out), why)
    require_shape(f"{prefix}.qzeros", find(stored, prefix, "qzeros"), (groups, words), why)
    size = _group_size(prefix, stated, width, groups, free=False)
    parts = {role: f"{prefix}.{role}" for role in ("qweight", "qzeros", "scales")}
    make = functools.partial(_dequantize_awq, size)
    return PackedWeight(f"{prefix}.weight", parts, (out, width), 4, make, _type(4, width, groups))


def _type(bits: int, width: int, groups: int) -> str:
    return f"int{bits} per channel" if groups == 1 else f"int{bits} g{math.ceil(width / groups)}"


def _dequantize_awq(size: int, parts: Mapping[str, Tensor]) -> Tensor:
    scales = parts["scales"].float()  # [groups, out]
    codes, zeros = _nibbles(parts["qweight"]), _nibbles(parts["qzeros"])
    group = torch.arange(len(codes)) // size
    return codes.sub_(zeros[group]).mul_(scales[group]).T.contiguous()


def _nibbles(packed: Tensor) -> Tensor:
    """Codes float32 ``[rows, 8 words]`` in the order of the output channels."""
    places = 4 * torch.tensor(_AWQ_NIBBLES, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> places) & 15).flatten(1).float()

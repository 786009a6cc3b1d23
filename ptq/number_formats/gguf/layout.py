"""The bytes of llama.cpp's block types, from codes and sub-scales and back (``ggml-quants.c``, ``gguf.quants``).

A block is 256 weights of a row (IQ4_NL: 32); numbers of 16 bits are little-endian float16.

    q2_k    16 sub-scales (low nibble: scale, high nibble: minimum), 64 codes of 2 bits, d, dmin             84 bytes
    q3_k    32 high bits, 64 low bits, 12 sub-scales of 6 bits (less 32), d                                 110
    q4_k    d, dmin, 12 sub-scales and minima of 6 bits, 128 codes of 4 bits                                144
    q5_k    d, dmin, 12 sub-scales and minima of 6 bits, 32 high bits, 128 low bits                         176
    q6_k    128 low bits, 64 high bits, 16 sub-scales of 8 bits with sign, d                                210
    iq4_nl  d, 16 bytes: code j in the low nibble of byte j, code 16 + j in its high nibble                  18
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "from_planes",
    "pack_halves",
    "pack_k4_scales",
    "pack_q3_scales",
    "to_planes",
    "unpack_halves",
    "unpack_k4_scales",
    "unpack_q3_scales",
]


def to_planes(codes: Tensor, bits: int, half: int) -> Tensor:
    """Codes ``[n, 256]`` of ``bits`` bits into bytes, where byte l of every ``half`` codes holds codes l, l + w, ...

    ``w = half * bits / 8`` is the number of bytes per ``half``: q2_k and the low bits of q3_k have 2 bits and 128
    codes, the nibbles of q4_k 4 bits and 64 codes, planes of single bits 1 bit and 256 codes.
    """
    fields = 8 // bits
    shaped = codes.reshape(len(codes), -1, fields, half // fields).to(torch.int16)
    shift = (bits * torch.arange(fields, device=codes.device, dtype=torch.int16)).view(1, 1, -1, 1)
    packed: Tensor = (shaped << shift).sum(2).to(torch.uint8)
    return packed.flatten(1)


def from_planes(packed: Tensor, bits: int, half: int) -> Tensor:
    """The inverse of `to_planes`, uint8 ``[n, 256]``."""
    fields = 8 // bits
    shift = (bits * torch.arange(fields, device=packed.device, dtype=torch.uint8)).view(1, 1, -1, 1)
    words = packed.reshape(len(packed), -1, 1, half // fields)
    codes: Tensor = (words >> shift) & (2**bits - 1)
    return codes.flatten(1)


def pack_q3_scales(scales: Tensor) -> Tensor:
    """Sixteen numbers of 6 bits ``[n, 16]`` in 12 bytes: low nibbles first, then pairs of high bits."""
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    high = (scales >> 4).view(-1, 4, 4)  # scale 4 i + j has its bits at 2 i of byte j
    return torch.cat((low, high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6), 1)


def unpack_q3_scales(packed: Tensor) -> Tensor:
    """The inverse of `pack_q3_scales`."""
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    high = torch.stack([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1).flatten(1)
    return low | (high << 4)


def pack_k4_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, each ``[n, 8]``, in 12 bytes."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat((first, second, third), 1)


def unpack_k4_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_k4_scales`."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales, minima


def pack_halves(values: Tensor) -> Tensor:
    """float16 ``[n]`` as bytes ``[n, 2]``."""
    return values.contiguous().view(torch.uint8).view(-1, 2)


def unpack_halves(packed: Tensor) -> Tensor:
    """The inverse of `pack_halves`."""
    return packed.contiguous().view(torch.float16).view(-1)

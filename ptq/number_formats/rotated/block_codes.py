"""Blocks of a row as consecutive words: the scales of a block, then its codes in two planes of bits.

A block of 256 codes of a symmetric codebook with eight levels is little-endian uint32 words:

    head   bits 0-15 the float16 scale; from bit 16 on the multiplier of sub-block j, ``bits`` bits each
    16     magnitude codes 0..3 (2 bits): word w, code k of 16 at bit 4 (k mod 8) + 2 (k div 8)
    8      signs, 1 for negative: word v, code 8 g + n of 32 at bit 4 n + g

so that 25 words (100 bytes) hold a block of eight 2-bit multipliers and 26 one of sixteen 3-bit multipliers. A shorter
last block has as many words of each plane as its codes need, with unused bits 0. The order inside the planes lets a
GPU turn eight codes into bytes with two instructions per four weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq.grids.sub_block_scales import SubBlockLayout

__all__ = ["block_words", "multiplier_bits", "pack_blocks", "row_words", "unpack_blocks"]

_MAGNITUDES = 4  # of the codebook: two bits


def multiplier_bits(layout: SubBlockLayout) -> int:
    """Width of one multiplier's code."""
    return (len(layout.multipliers) - 1).bit_length()


def block_words(layout: SubBlockLayout, columns: int) -> int:
    """Words of a block of ``columns`` codes."""
    return _head_words(layout) + math.ceil(columns / 16) + math.ceil(columns / 32)


def row_words(layout: SubBlockLayout, width: int) -> int:
    """Words of a row of ``width`` codes."""
    full, rest = divmod(width, layout.block)
    return full * block_words(layout, layout.block) + (block_words(layout, rest) if rest else 0)


def pack_blocks(codes: Tensor, scale: Tensor, index: Tensor, layout: SubBlockLayout) -> Tensor:
    """Pack whole rows.

    Args:
        codes: uint8 ``[out, in]``, positions in the ascending levels ``-m3 .. -m0, m0 .. m3``.
        scale: float16 ``[out, blocks]``.
        index: multipliers uint8 ``[out, subs]``.
        layout: of the scales.

    Returns:
        int32 ``[out, row_words]``, contiguous.

    Raises:
        ValueError: a code or multiplier that does not exist.
    """
    if codes.numel() and int(codes.max()) >= 2 * _MAGNITUDES:
        raise ValueError(f"a code of {int(codes.max())} in a codebook of {2 * _MAGNITUDES} levels")
    if index.numel() and int(index.max()) >= len(layout.multipliers):
        raise ValueError(f"a multiplier of {int(index.max())}, there are {len(layout.multipliers)}")
    full = codes.shape[1] // layout.block
    split, subs = full * layout.block, full * layout.block // layout.sub
    parts = []
    if full:
        parts.append(_pack(codes[:, :split], scale[:, :full], index[:, :subs], layout, layout.block))
    if split < codes.shape[1]:
        parts.append(_pack(codes[:, split:], scale[:, full:], index[:, subs:], layout, codes.shape[1] - split))
    return torch.cat(parts, 1).contiguous()


def unpack_blocks(packed: Tensor, layout: SubBlockLayout, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_blocks`: codes, scales and multipliers of rows of ``width`` codes.

    Raises:
        ValueError: rows of another length.
    """
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != row_words(layout, width):
        raise ValueError(
            f"{width} codes take int32 rows of {row_words(layout, width)} words, got {packed.dtype} "
            f"{list(packed.shape)}"
        )
    full = width // layout.block
    split = full * block_words(layout, layout.block)
    parts = []
    if full:
        parts.append(_unpack(packed[:, :split], layout, layout.block))
    if width % layout.block:
        parts.append(_unpack(packed[:, split:], layout, width % layout.block))
    codes, scale, index = (torch.cat(tensors, 1).contiguous() for tensors in zip(*parts, strict=True))
    return codes, scale, index


def _head_words(layout: SubBlockLayout) -> int:
    return math.ceil((16 + layout.block // layout.sub * multiplier_bits(layout)) / 32)


def _pack(codes: Tensor, scale: Tensor, index: Tensor, layout: SubBlockLayout, columns: int) -> Tensor:
    """Blocks of ``columns`` codes."""
    out, blocks = scale.shape
    padded = math.ceil(columns / 32) * 32
    codes = torch.nn.functional.pad(codes.reshape(out, blocks, columns), (0, padded - columns), value=_MAGNITUDES)
    negative = codes < _MAGNITUDES
    magnitude = torch.where(negative, _MAGNITUDES - 1 - codes, codes - _MAGNITUDES)
    # [out, blocks, words, 2, 8] and [out, blocks, words, 4, 8]: the last index counts nibbles
    low = _collect(magnitude.view(out, blocks, -1, 2, 8), bits=2)[..., : math.ceil(columns / 16)]
    signs = _collect(negative.view(out, blocks, -1, 4, 8), bits=1)
    return torch.cat((_pack_head(scale, index, layout), _words(low), _words(signs)), -1).view(out, -1)


def _collect(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., words, fields, 8]``, field f of nibble n at bit ``4 n + bits f``, as int64 words."""
    fields = torch.arange(codes.shape[-2], device=codes.device)[:, None] * bits
    shift = fields + 4 * torch.arange(8, device=codes.device)
    words: Tensor = (codes.to(torch.int64) << shift).sum((-1, -2))
    return words


def _spread(words: Tensor, fields: int, bits: int) -> Tensor:
    """The inverse of `_collect`, uint8 ``[..., words * fields * 8]``."""
    shift = torch.arange(fields, device=words.device)[:, None] * bits + 4 * torch.arange(8, device=words.device)
    codes: Tensor = ((words[..., None, None] >> shift.to(torch.int32)) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-3)


def _pack_head(scale: Tensor, index: Tensor, layout: SubBlockLayout) -> Tensor:
    """int32 ``[out, blocks, head words]``."""
    out, blocks = scale.shape
    bits, words = multiplier_bits(layout), _head_words(layout)
    value = scale.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    multipliers = index.view(out, blocks, -1).to(torch.int64)
    shift = 16 + bits * torch.arange(multipliers.shape[-1], device=index.device)
    value = value + (multipliers << shift).sum(-1)
    return _words(torch.stack([value >> (32 * word) for word in range(words)], -1))


def _words(values: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers, as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _unpack(packed: Tensor, layout: SubBlockLayout, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of ``columns`` codes."""
    words = packed.reshape(len(packed), -1, block_words(layout, columns))  # [out, blocks, words]
    head, low_words = _head_words(layout), math.ceil(columns / 16)
    magnitude = _spread(words[..., head : head + low_words], 2, 2)[..., :columns]
    negative = _spread(words[..., head + low_words :], 4, 1)[..., :columns]
    codes = torch.where(negative.bool(), _MAGNITUDES - 1 - magnitude, magnitude + _MAGNITUDES)
    unsigned = words[..., :head].to(torch.int64) & 0xFFFFFFFF
    value = sum((unsigned[..., word] << (32 * word)) for word in range(head))
    assert isinstance(value, Tensor)
    bits = multiplier_bits(layout)
    shift = 16 + bits * torch.arange(math.ceil(columns / layout.sub), device=packed.device)
    index = ((value[..., None] >> shift) & (2**bits - 1)).to(torch.uint8)
    scale = words[..., 0].contiguous().view(torch.int16)[..., ::2].contiguous().view(torch.float16)
    return codes.flatten(1), scale, index.flatten(1)

"""The CUDA kernels' order of a weight: the checkpoint's codes and scales repacked into units of 16 rows x 256 columns.

A unit is what a warp reads at once, in the register order of ``mma.m16n8k32``: lane ``4 g + q`` holds rows ``g`` and
``g + 8``, and of these

    uniform   columns 64 i + 32 j + 8 q + 4 word + byte   (i < 4, j < 2, word < 2, byte < 4), all bits of a byte used
    itq3s     columns 128 sub + 32 q + 16 b + 8 h + 2 m + p   as 3-bit selectors of a byte permutation

Rows are filled up to 16 and columns to 256 with codes whose scale is 0. Codes take the bytes they took before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["UNIT_COLUMNS", "UNIT_ROWS", "repack_blocks", "repack_uniform"]

UNIT_ROWS, UNIT_COLUMNS = 16, 256
_CHUNK = 1 << 24  # weights repacked at a time


def repack_uniform(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[rows, columns]`` of 2, 3, 4 or 8 bits to int32 ``[tiles, blocks, bits, 32, 4]``."""
    return torch.cat([_uniform(part, bits) for part in _tiles(codes)])


def repack_scales(scale: Tensor, group: int, columns: int, unit_group: int) -> Tensor:
    """Scales or zeros ``[rows, groups]`` to ``[tiles, blocks, 8, 256 / unit_group, 2]``.

    Args:
        scale: of consecutive columns.
        group: columns that share one.
        columns: of the weight.
        unit_group: columns that share one in the kernel: 32, 64 or 128, a divisor of ``group``, or of 32 in any case.
    """
    rows, blocks = len(scale), math.ceil(columns / UNIT_COLUMNS)
    start = torch.arange(blocks * UNIT_COLUMNS // unit_group, device=scale.device) * unit_group
    inside = start < columns
    spread = scale[:, (start // group).clamp(max=scale.shape[1] - 1)]
    spread = torch.where(inside, spread, torch.zeros_like(spread))
    spread = torch.nn.functional.pad(spread, (0, 0, 0, -rows % UNIT_ROWS))
    return spread.view(-1, 2, 8, blocks, UNIT_COLUMNS // unit_group).permute(0, 3, 2, 4, 1).contiguous()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zeros uint8 ``[tiles, blocks, 8, groups, 2]`` to bytes: two of up to 4 bits in one, the first row's low."""
    return (zeros[..., 0] | (zeros[..., 1] << 4)).contiguous() if bits <= 4 else zeros.contiguous()


def repack_blocks(codes: Tensor, scale: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of ``itq3s`` to int32 codes ``[tiles, blocks, 3, 32, 4]`` and scales ``[tiles, blocks, 8, 2]``.

    Args:
        codes: uint8 ``[rows, columns]``, positions in the ascending levels.
        scale: float16 ``[rows, blocks]``.
        index: of the multipliers, uint8 ``[rows, sub-blocks]``.
    """
    rows, columns = codes.shape
    blocks = math.ceil(columns / UNIT_COLUMNS)
    index = torch.nn.functional.pad(index, (0, blocks * 8 - index.shape[1], 0, -rows % UNIT_ROWS))
    scale = torch.nn.functional.pad(scale, (0, 0, 0, -rows % UNIT_ROWS))
    head = scale.contiguous().view(torch.int16).long() & 0xFFFF
    shift = 16 + 2 * torch.arange(8, device=codes.device)
    head = head + (index.long().view(len(index), blocks, 8) << shift).sum(-1)
    meta = _int32(head.view(-1, 2, 8, blocks).permute(0, 3, 2, 1)).contiguous()
    # a selector's low two bits are the magnitude, bit 2 the sign
    selector = torch.where(codes < 4, 7 - codes, codes - 4)
    return torch.cat([_selectors(part) for part in _tiles(selector)]), meta


def _tiles(codes: Tensor) -> Iterator[Tensor]:
    """Whole tiles of rows, padded, some at a time."""
    rows, columns = codes.shape
    step = max(1, _CHUNK // columns // UNIT_ROWS) * UNIT_ROWS
    for start in range(0, rows, step):
        part = codes[start : start + step]
        yield torch.nn.functional.pad(part, (0, -columns % UNIT_COLUMNS, 0, -len(part) % UNIT_ROWS))


def _uniform(codes: Tensor, bits: int) -> Tensor:
    blocks = codes.shape[1] // UNIT_COLUMNS
    # tile row g block i j q word byte -> tile block i g q row j word byte
    c = codes.view(-1, 2, 8, blocks, 4, 2, 4, 2, 4).permute(0, 3, 4, 2, 6, 1, 5, 7, 8).int()
    first, second = c[..., 0, :, :, :], c[..., 1, :, :, :]  # the two rows: [tile, block, i, g, q, j, word, byte]
    if bits == 8:
        words = torch.stack([first[..., 0, :, :], second[..., 0, :, :], first[..., 1, :, :], second[..., 1, :, :]], -3)
    elif bits == 4:
        words = torch.stack([row[..., 0, :, :] | row[..., 1, :, :] << 4 for row in (first, second)], -3)
    elif bits == 2:
        words = first[..., 0, :, :] | second[..., 0, :, :] << 2 | first[..., 1, :, :] << 4 | second[..., 1, :, :] << 6
    else:
        words = _three_bits(first, second)
    words = _bytes_to_words(words)  # [tile, block, i, g, q, ...]
    words = words.flatten(5).permute(0, 1, 3, 4, 2, 5).reshape(len(words), blocks, 32, bits, 4)
    return words.permute(0, 1, 3, 2, 4).contiguous()


def _three_bits(first: Tensor, second: Tensor) -> Tensor:
    """Bytes with two codes of the first row and two bits of a third; the last word has the rest."""
    (f0, f1), (s0, s1) = ((row[..., 0, :, :], row[..., 1, :, :]) for row in (first, second))  # [..., word, byte]
    own = f0 | f1 << 3 | (s0 >> 1) << 6
    last = s1[..., 1, :] | s1[..., 0, :] << 3 | (s0[..., 0, :] & 1) << 6 | (s0[..., 1, :] & 1) << 7
    return torch.cat([own, last[..., None, :]], -2)


def _bytes_to_words(codes: Tensor) -> Tensor:
    """``[..., 4]`` bytes to little-endian int32 ``[...]``."""
    return codes.to(torch.uint8).contiguous().view(torch.int32).squeeze(-1)


def _selectors(codes: Tensor) -> Tensor:
    blocks = codes.shape[1] // UNIT_COLUMNS
    # tile row g block sub q b h m p -> tile block g q row sub m (p h b): nibble 4 p + 2 h + b of word m
    c = codes.view(-1, 2, 8, blocks, 2, 4, 2, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 8, 9, 7, 6)
    c = c.reshape(-1, blocks, 8, 4, 2, 2, 4, 8).long()
    nibble = 4 * torch.arange(8, device=c.device)
    words = [((c[..., m, :] << nibble) | (((c[..., 3, :] >> m) & 1) << (nibble + 3))).sum(-1) for m in range(3)]
    packed = torch.stack(words, -1).reshape(len(c), blocks, 32, 3, 4)
    return _int32(packed).permute(0, 1, 3, 2, 4).contiguous()


def _int32(values: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers, as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)

"""The checkpoint's tensors from the CUDA kernels' order of a weight: what `ptq.runtime.cuda_layout` does, backwards.

A layer on a GPU keeps the kernels' order alone; whoever reads its stored tensors (saving, another device, the
reference) gets them from here, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq.runtime.cuda_layout import UNIT_COLUMNS, UNIT_ROWS

__all__ = ["restore_blocks", "restore_scales", "restore_uniform", "unpack_zero_pairs"]

_CHUNK = 1 << 24  # weights restored at a time


def restore_uniform(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """int32 ``[tiles, blocks, bits, 32, 4]`` to codes uint8 ``[rows, columns]``."""
    return torch.cat([_uniform(part, bits)[:, :columns] for part in _parts(packed)])[:rows].contiguous()


def restore_scales(units: Tensor, group: int, unit_group: int, rows: int, columns: int) -> Tensor:
    """Scales or zeros ``[tiles, blocks, 8, 256 / unit_group, 2]`` to ``[rows, groups]``.

    Args:
        units: in the kernels' order.
        group: columns that share one in the checkpoint.
        unit_group: columns that share one in the kernel.
        rows: of the weight.
        columns: of the weight.
    """
    spread = units.permute(0, 4, 2, 1, 3).reshape(len(units) * UNIT_ROWS, -1)[:rows]
    first = torch.arange(math.ceil(columns / group), device=units.device) * group // unit_group
    return spread[:, first].contiguous()


def unpack_zero_pairs(zeros: Tensor, bits: int) -> Tensor:
    """Bytes to zeros uint8 ``[tiles, blocks, 8, groups, 2]``."""
    return torch.stack([zeros & 15, zeros >> 4], -1) if bits <= 4 else zeros


def restore_blocks(packed: Tensor, meta: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of ``itq3s``: codes uint8 ``[rows, columns]``, scale float16 ``[rows, blocks]``, multipliers' index."""
    selector = torch.cat([_selectors(part)[:, :columns] for part in _parts(packed)])[:rows]
    codes = torch.where(selector >= 4, 7 - selector, selector + 4).contiguous()
    head = meta.permute(0, 3, 2, 1).reshape(len(meta) * UNIT_ROWS, -1)[:rows].long()  # [rows, blocks]
    low = head & 0xFFFF
    scale = torch.where(low >= 2**15, low - 2**16, low).to(torch.int16).view(torch.float16)
    shift = 16 + 2 * torch.arange(8, device=meta.device)
    index = ((head[..., None] >> shift) & 3).to(torch.uint8).flatten(1)
    return codes, scale.contiguous(), index[:, : math.ceil(columns / 32)].contiguous()


def _parts(packed: Tensor) -> tuple[Tensor, ...]:
    """Some tiles at a time."""
    return torch.split(packed, max(1, _CHUNK // (packed.shape[1] * UNIT_COLUMNS * UNIT_ROWS)))


def _lanes(packed: Tensor) -> Tensor:
    """``[tiles, blocks, vectors, 32, 4]`` to the words of a lane ``[tiles, blocks, 8 g, 4 q, words]``."""
    tiles, blocks = packed.shape[:2]
    return packed.permute(0, 1, 3, 2, 4).reshape(tiles, blocks, 8, 4, -1)


def _uniform(packed: Tensor, bits: int) -> Tensor:
    tiles, blocks = packed.shape[:2]
    words = _lanes(packed).view(tiles, blocks, 8, 4, 4, bits)
    words = words.permute(0, 1, 4, 2, 3, 5).contiguous()  # [tile, block, i, g, q, word]
    lanes = (tiles, blocks, 4, 8, 4)
    octets = words.view(torch.uint8).view(*lanes, bits, 4)
    mask = 2**bits - 1
    if bits == 8:
        fields = octets.view(*lanes, 2, 2, 2, 4).transpose(-4, -3)  # [..., j, row, word, byte] to [..., row, j, ...]
    elif bits == 4:
        rows = octets.view(*lanes, 2, 2, 4)  # [..., row, word, byte]
        fields = torch.stack([rows & mask, rows >> 4], -3)  # [..., row, j, word, byte]
    elif bits == 2:
        first, second = (torch.stack([octets >> s & mask, octets >> s + 4 & mask], -3) for s in (0, 2))
        fields = torch.stack([first, second], -4)
    else:
        fields = _three_bits(octets)
    # tile block i g q row j word byte -> tile row g block i j q word byte
    codes: Tensor = fields.permute(0, 5, 3, 1, 2, 6, 4, 7, 8).reshape(tiles * UNIT_ROWS, blocks * UNIT_COLUMNS)
    return codes


def _three_bits(octets: Tensor) -> Tensor:
    own, last = octets[..., :2, :], octets[..., 2, :]
    low = torch.stack([last >> 6 & 1, last >> 7 & 1], -2)  # [..., word, byte]
    second = torch.stack([(own >> 6) << 1 | low, torch.stack([last >> 3 & 7, last & 7], -2)], -3)
    return torch.stack([torch.stack([own & 7, own >> 3 & 7], -3), second], -4)  # [..., row, j, word, byte]


def _selectors(packed: Tensor) -> Tensor:
    tiles, blocks = packed.shape[:2]
    words = _lanes(packed).view(tiles, blocks, 8, 4, 2, 2, 3).long() & 0xFFFFFFFF  # [tile, block, g, q, row, sub, m]
    nibbles = words[..., None] >> 4 * torch.arange(8, device=packed.device) & 15  # [..., m, nibble]
    top = nibbles >> 3
    fourth = top[..., 0, :] | top[..., 1, :] << 1 | top[..., 2, :] << 2
    fields = torch.cat([nibbles & 7, fourth[..., None, :]], -2).to(torch.uint8)
    fields = fields.view(tiles, blocks, 8, 4, 2, 2, 4, 2, 2, 2)
    # tile block g q row sub m p h b -> tile row g block sub q b h m p
    return fields.permute(0, 4, 2, 1, 5, 3, 9, 8, 6, 7).reshape(tiles * UNIT_ROWS, blocks * UNIT_COLUMNS)

"""What the CUDA kernels compute, slowly, from the tensors they read: for machines without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.runtime.cuda_products import CudaWeight


def dense(made: CudaWeight, rows: int, columns: int) -> Tensor:
    """The weight as a lane decodes it, float64 ``[rows, columns]``."""
    whole = _blocks(made) if made.format == 0 else _uniform(made)
    return whole[:rows, :columns]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Activations as integers with a scale per 256 channels, and back, float64."""
    top = {16: 32639.0, 8: 127.0}[bits]
    parts = []
    for part in x.double().split(256, -1):
        step = part.abs().amax(-1, keepdim=True).clamp(min=1e-300) / top
        parts.append((part / step).round() * step)
    return torch.cat(parts, -1)


def _lanes(made: CudaWeight) -> Tensor:
    """int64 ``[tiles, blocks, g, q, words of a lane]``."""
    codes = made.codes.long() & 0xFFFFFFFF
    tiles, blocks, vectors, _, _ = codes.shape
    return codes.permute(0, 1, 3, 2, 4).reshape(tiles, blocks, 8, 4, 4 * vectors)


def _uniform(made: CudaWeight) -> Tensor:
    words, bits = _lanes(made), made.format
    tiles, blocks = words.shape[:2]
    out = torch.zeros(tiles, 2, 8, blocks, 4, 2, 4, 2, 4, dtype=torch.int64)  # tile row g block i j q word byte
    for i in range(4):
        for j in range(2):
            for row in range(2):
                for word in range(2):
                    for byte in range(4):
                        code = _code(words, bits, i, j, row, word) >> (8 * byte)
                        if bits == 3 and row == 1:
                            code = _third(words, i, j, word, byte)
                        out[:, row, :, :, i, j, :, word, byte] = (code & (2**bits - 1)).permute(0, 2, 1, 3)
    codes = out.reshape(tiles * 16, blocks * 256)
    scale = _per_column(made.scales.double(), made.group)
    zero = torch.full_like(codes, 2 ** (bits - 1))
    if made.zeros is not None:
        points = made.zeros.long()
        pairs = torch.stack([points & 15, points >> 4], -1) if bits <= 4 else points
        zero = _per_column(pairs, made.group)
    return (codes - zero).double() * scale


def _code(words: Tensor, bits: int, i: int, j: int, row: int, word: int) -> Tensor:
    """The code in byte 0."""
    if bits == 2:
        return words[..., 2 * i + word] >> (4 * j + 2 * row)
    if bits == 4:
        return words[..., 4 * i + 2 * row + word] >> (4 * j)
    if bits == 8:
        return words[..., 8 * i + 4 * j + 2 * row + word]
    return words[..., 3 * i + word] >> (3 * j)


def _third(words: Tensor, i: int, j: int, word: int, byte: int) -> Tensor:
    own, last = words[..., 3 * i + word] >> (8 * byte), words[..., 3 * i + 2] >> (8 * byte)
    if j == 0:
        return (own >> 6 & 3) << 1 | (last >> (6 + word) & 1)
    return last if word else last >> 3


def _per_column(values: Tensor, group: int) -> Tensor:
    """``[tiles, blocks, 8, groups, 2]`` to ``[rows, columns]``."""
    tiles, blocks = values.shape[:2]
    return (
        values.permute(0, 4, 2, 1, 3).reshape(tiles * 16, -1).repeat_interleave(group, 1).view(tiles * 16, blocks * 256)
    )


def _blocks(made: CudaWeight) -> Tensor:
    words = _lanes(made)
    tiles, blocks = words.shape[:2]
    meta = made.scales.long() & 0xFFFFFFFF  # [tiles, blocks, g, row]
    scale = (meta & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16).double()
    levels = torch.tensor([1.0, 3, 5, 8, -1, -3, -5, -8], dtype=torch.float64)
    factors = torch.tensor([15.0, 12, 10, 8], dtype=torch.float64)
    out = torch.zeros(tiles, 2, 8, blocks, 2, 4, 32, dtype=torch.float64)  # tile row g block sub q column
    for row in range(2):
        for sub in range(2):
            a, b, c = (words[..., 6 * row + 3 * sub + k] for k in range(3))
            last = (a >> 3 & 0x11111111) | (b >> 2 & 0x22222222) | (c >> 1 & 0x44444444)
            for q in range(4):
                factor = factors[meta[..., row] >> (16 + 2 * q + 8 * sub) & 3] * scale[..., row]  # [tile, block, g]
                for m, selectors in enumerate((a, b, c, last)):
                    for nibble in range(8):
                        p, h, k = nibble >> 2, nibble >> 1 & 1, nibble & 1
                        value = levels[selectors[..., q] >> (4 * nibble) & 7] * factor
                        out[:, row, :, :, sub, q, 16 * k + 8 * h + 2 * m + p] = value.permute(0, 2, 1)
    return out.reshape(tiles * 16, blocks * 256)

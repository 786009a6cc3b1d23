"""Two 4-bit codes per byte, the first of each pair in the low nibble (the order of NVFP4, MXFP4 and GGUF)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_nibbles", "unpack_nibbles"]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes below 16, uint8 ``[rows, n]``, into uint8 ``[rows, ceil(n/2)]``; an odd row ends with a 0 nibble.

    Raises:
        ValueError: a code needs more than 4 bits.
    """
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a code of {int(codes.max())} does not fit in 4 bits")
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Unpack the first ``n`` codes of every row of uint8 ``[rows, ceil(n/2)]`` into uint8 ``[rows, n]``.

    Raises:
        ValueError: ``packed`` is not a uint8 matrix of that width.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-n // 2):
        raise ValueError(f"{n} codes take uint8 [rows, {-(-n // 2)}], got {packed.dtype} {list(packed.shape)}")
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :n].contiguous()

"""Dense packing of codes: ``bits`` bits each, no padding between them, so that 3 bits cost 3 bits.

A row of codes is one little-endian stream of bits: code ``i`` occupies bits ``i*bits .. i*bits+bits-1``, bit ``j`` of
the stream is bit ``j % 32`` of int32 word ``j // 32``, and a code may straddle two words. Eight codes are always
``bits`` whole bytes, which is what both directions work on: eight codes sit in one int64 and are spread to eight bytes
(or squeezed from them) by halves, 4 + 4 codes, 2 + 2, 1 + 1, for all rows at once.

    3 bits, 8 codes in 24 bits   hgfedcba  ->  ....hgfe ....dcba  ->  ..hg..fe ..dc..ba  ->  .h.g.f.e .d.c.b.a

The host is taken to be little-endian, as safetensors files are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pack_rows", "packed_width", "unpack_rows"]

MAX_PACK_BITS = 8
CPU_CHUNK = 2**18
"""Codes worked on at a time on the CPU: the temporaries (one byte a code) stay in a core's cache."""
DEVICE_CHUNK = 2**24
"""Codes worked on at a time elsewhere: the temporaries stay below 100 MB."""


def packed_width(n: int, bits: int) -> int:
    """Number of int32 words that ``n`` codes of ``bits`` bits take."""
    return math.ceil(n * bits / 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 ``[rows, n]``, into int32 ``[rows, ceil(n*bits/32)]``; unused bits at the end of a row are 0.

    Raises:
        ValueError: ``bits`` is not 1 to 8, ``codes`` is not a uint8 matrix, or a code needs more than ``bits`` bits.
    """
    _check(codes, torch.uint8, bits)
    rows, n = codes.shape
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    packed = torch.empty(rows, packed_width(n, bits), dtype=torch.int32, device=codes.device)
    for start, stop in _chunks(codes.device, rows, n):
        octets = codes.new_zeros(stop - start, math.ceil(n / 32) * 4, 8)
        octets.view(stop - start, -1)[:, :n] = codes[start:stop]
        if bits < 8:
            octets = _squeeze(octets.view(torch.int64).squeeze(-1), bits).unsqueeze(-1).view(torch.uint8)[..., :bits]
        packed[start:stop] = octets.reshape(stop - start, -1).contiguous().view(torch.int32)[:, : packed.shape[1]]
    return packed


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack the first ``n`` codes of every row of int32 ``[rows, ceil(n*bits/32)]`` into uint8 ``[rows, n]``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``packed`` is not an int32 matrix of that width.
    """
    _check(packed, torch.int32, bits)
    rows, words = packed.shape
    if words != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} words a row, got {words}")
    codes = torch.empty(rows, n, dtype=torch.uint8, device=packed.device)
    for start, stop in _chunks(packed.device, rows, n):
        stream = packed[start:stop].contiguous().view(torch.uint8)  # [chunk, 4 * words]
        codes[start:stop] = stream[:, :n] if bits == 8 else _unpack_bytes(stream, bits, math.ceil(n / 8))[:, :n]
    return codes


def _check(tensor: Tensor, dtype: torch.dtype, bits: int) -> None:
    if not 1 <= bits <= MAX_PACK_BITS:
        raise ValueError(f"packing takes 1 to {MAX_PACK_BITS} bits a code, got {bits}")
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise ValueError(f"expected a {dtype} matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _chunks(device: torch.device, rows: int, n: int) -> list[tuple[int, int]]:
    """Ranges of rows that hold about one chunk of codes each."""
    size = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    step = max(1, size // max(n, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _unpack_bytes(stream: Tensor, bits: int, octets: int) -> Tensor:
    """Bytes ``[rows, >= n*bits/8]`` to codes ``[rows, 8 * octets]``; bytes that a ragged row lacks count as 0."""
    rows, width = stream.shape
    if width < octets * bits:
        stream = torch.nn.functional.pad(stream, (0, octets * bits - width))
    spread = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=stream.device)
    spread[..., :bits] = stream[:, : octets * bits].view(rows, octets, bits)
    return _spread(spread.view(torch.int64), bits).view(torch.uint8).view(rows, 8 * octets)


def _spread(x: Tensor, bits: int) -> Tensor:
    """Eight codes in the low ``8 * bits`` bits of an int64, one to each of its bytes. Overwrites ``x``."""
    for codes in (4, 2, 1):
        low, shift = _low_half(codes, bits), codes * (8 - bits)
        high = (x << shift).bitwise_and_(low << (8 * codes))
        x = x.bitwise_and_(low).bitwise_or_(high)
    return x


def _squeeze(x: Tensor, bits: int) -> Tensor:
    """The inverse of `_spread`."""
    for codes in (1, 2, 4):
        low, shift = _low_half(codes, bits), codes * (8 - bits)
        high = (x >> shift).bitwise_and_(low << (codes * bits))
        x = x.bitwise_and_(low).bitwise_or_(high)
    return x


def _low_half(codes: int, bits: int) -> int:
    """Mask of ``codes`` adjacent codes at the bottom of every field of ``2 * codes`` bytes of an int64."""
    run = 2 ** (codes * bits) - 1
    return sum(run << (16 * codes * i) for i in range(4 // codes))

"""The Triton kernels of `ptq.runtime.triton_products`: tiles of rows x vectors, codes decoded as they are loaded.

This module can be imported without Triton; kernels are made at the first use.
"""

from __future__ import annotations

import functools
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["BLOCK_COLUMNS", "blocks_kernel", "has_triton", "uniform_kernel"]

BLOCK_COLUMNS = 128
"""Columns that a uniform weight is decoded by."""


def has_triton() -> bool:
    """Whether Triton is installed."""
    return triton is not None


@functools.cache
def uniform_kernel() -> Any:
    """Integers of 2, 3, 4 or 8 bits."""
    return triton.jit(_uniform)


@functools.cache
def blocks_kernel() -> Any:
    """Blocks of ``itq3s``."""
    return triton.jit(_blocks)


def _uniform(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    zeros,
    bias,
    y,
    vectors,
    rows,
    columns,
    words,
    groups,
    group,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    inside = row < rows
    line = row.to(tl.int64)
    total = tl.zeros((VECTORS, ROWS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if BITS == 3:  # 32 codes in three words, of which two of 64 bits hold every code whole
            first = start // 32 * 3 + tl.arange(0, COLUMNS // 32) * 3
            at = codes + line[:, None] * words + first[None, :]
            known = inside[:, None]
            a = tl.load(at, mask=known & (first < words)[None, :], other=0).to(tl.int64) & 0xFFFFFFFF
            b = tl.load(at + 1, mask=known & (first + 1 < words)[None, :], other=0).to(tl.int64) & 0xFFFFFFFF
            c = tl.load(at + 2, mask=known & (first + 2 < words)[None, :], other=0).to(tl.int64) & 0xFFFFFFFF
            low, high = a | (b << 32), b | (c << 32)
            number = tl.arange(0, 32)[None, None, :]
            early = (low[:, :, None] >> (3 * tl.minimum(number, 20))) & 7
            late = (high[:, :, None] >> tl.maximum(3 * number - 32, 0)) & 7
            code = tl.reshape(tl.where(number < 21, early, late).to(tl.int32), (ROWS, COLUMNS))
        else:
            first = start * BITS // 32 + tl.arange(0, COLUMNS * BITS // 32)
            known = inside[:, None] & (first < words)[None, :]
            word = tl.load(codes + line[:, None] * words + first[None, :], mask=known, other=0)
            shift = BITS * tl.arange(0, 32 // BITS)[None, None, :]
            code = tl.reshape((word[:, :, None] >> shift) & ((1 << BITS) - 1), (ROWS, COLUMNS))
        one = start // group + tl.arange(0, GROUPS)
        known = inside[:, None] & (one < groups)[None, :]
        scale = tl.load(scales + line[:, None] * groups + one[None, :], mask=known, other=0.0).to(tl.float32)
        wide = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, COLUMNS // GROUPS))
        weight = code.to(tl.float32)
        if ASYMMETRIC:
            zero = tl.load(zeros + line[:, None] * groups + one[None, :], mask=known, other=0).to(tl.float32)
            spread = tl.broadcast_to(zero[:, :, None], (ROWS, GROUPS, COLUMNS // GROUPS))
            weight = weight - tl.reshape(spread, (ROWS, COLUMNS))
        else:
            weight = weight - (1 << (BITS - 1))
        weight = weight * tl.reshape(wide, (ROWS, COLUMNS))
        there = (vector < vectors)[:, None] & (column < columns)[None, :]
        part = tl.load(x + vector.to(tl.int64)[:, None] * columns + column[None, :], mask=there, other=0.0)
        weight = tl.where((column < columns)[None, :], weight, 0.0).to(part.dtype)
        total = tl.dot(part, tl.trans(weight), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y + vector.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(vector < vectors)[:, None] & inside[None, :])


def _blocks(  # type: ignore[no-untyped-def]
    x,
    codes,
    bias,
    y,
    vectors,
    rows,
    columns,
    words,
    BIAS: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    inside = row < rows
    total = tl.zeros((VECTORS, ROWS), tl.float32)
    start_of_row = codes + row.to(tl.int64) * words
    for block in range(0, columns // 256):
        at = start_of_row + block * 25
        head = tl.load(at, mask=inside, other=0)
        scale = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        pick = (head[:, None] >> (16 + 2 * tl.arange(0, 8))[None, :]) & 3
        factor = tl.where(pick < 2, tl.where(pick == 0, 15.0, 12.0), tl.where(pick == 2, 10.0, 8.0))
        factor = factor * scale[:, None]  # [rows, sub-blocks]
        wide = tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, 8, 32)), (ROWS, 256))
        plane = tl.load(at[:, None] + 1 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
        sixteen = tl.arange(0, 16)[None, None, :]
        low = tl.reshape((plane[:, :, None] >> (4 * (sixteen % 8) + 2 * (sixteen // 8))) & 3, (ROWS, 256))
        signs = tl.load(at[:, None] + 17 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
        many = tl.arange(0, 32)[None, None, :]
        minus = tl.reshape((signs[:, :, None] >> (4 * (many % 8) + many // 8)) & 1, (ROWS, 256))
        level = tl.where(low < 2, tl.where(low == 0, 1.0, 3.0), tl.where(low == 2, 5.0, 8.0))
        weight = tl.where(minus == 1, -level, level) * wide
        column = block * 256 + tl.arange(0, 256)
        there = (vector < vectors)[:, None]
        part = tl.load(x + vector.to(tl.int64)[:, None] * columns + column[None, :], mask=there, other=0.0)
        total = tl.dot(part, tl.trans(weight.to(part.dtype)), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y + vector.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(vector < vectors)[:, None] & inside[None, :])

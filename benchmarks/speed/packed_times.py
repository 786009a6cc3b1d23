"""The rows ``one``, ``batches`` and ``paths`` of packed_products.py: seconds of single products beside bfloat16's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from packed_common import (
    DEVICE,
    FORMATS,
    SHAPES,
    Lines,
    calls,
    copies,
    dense_seconds,
    generator,
    size,
    timed,
    torch_int4_seconds,
)

from ptq.runtime import cuda_products


def one(lines: Lines, copy: float) -> None:
    for shape, (rows, columns) in SHAPES.items():
        dense = dense_seconds(rows, columns, 1)
        int4 = torch_int4_seconds(rows, columns, 1)
        lines.add(
            "one", shape=shape, format="bf16", us=round(dense * 1e6, 2), torch_int4_us=int4 and round(int4 * 1e6, 2)
        )
        torch.cuda.empty_cache()
        for name in FORMATS:
            weights = copies(name, rows, columns)
            x = torch.randn(1, columns, device=DEVICE, generator=generator(9)).bfloat16()
            for pdl in ("1", "0"):
                os.environ["PTQ_PDL"] = pdl
                seconds = timed(calls(weights, x, rows, columns), 320 if size(weights[0]) < 5e7 else 0)
                share = 100 * size(weights[0]) / seconds / copy
                lines.add(
                    "one",
                    shape=shape,
                    format=name,
                    pdl=int(pdl),
                    us=round(seconds * 1e6, 2),
                    percent=round(share, 1),
                    times_bf16=round(dense / seconds, 2),
                )
            del weights
            torch.cuda.empty_cache()
    os.environ["PTQ_PDL"] = "1"


def batches(lines: Lines, copy: float) -> None:
    for shape in ("4096x4096", "8192x28672"):
        rows, columns = SHAPES[shape]
        for batch in (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 1024, 4096):
            dense = dense_seconds(rows, columns, batch)
            found: dict[str, float] = {}
            for name in ("itq3s", "int4 g128 sym"):
                weights = copies(name, rows, columns)[: 60 if batch <= 64 else 6]
                x = torch.randn(batch, columns, device=DEVICE, generator=generator(9)).bfloat16()
                least = 0 if batch > 64 or rows > 5000 else 60
                usual = cuda_products._MOST_VECTORS
                forced = {"": usual, " dense": _switch_at(0), " in sixteens": _switch_at(4096)}
                for how, switch in forced.items() if 16 < batch <= 256 else (("", usual),):
                    cuda_products._MOST_VECTORS = switch
                    found[name + how] = timed(calls(weights, x, rows, columns), least)
                cuda_products._MOST_VECTORS = usual
                del weights
                torch.cuda.empty_cache()
            lines.add(
                "batches",
                shape=shape,
                batch=batch,
                bf16_us=round(dense * 1e6, 2),
                us={k: round(v * 1e6, 2) for k, v in found.items()},
                times_bf16={k: round(dense / v, 2) for k, v in found.items()},
            )


def _switch_at(vectors: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Products in sixteens up to so many vectors, whatever the weight."""
    return dict.fromkeys(cuda_products._MOST_VECTORS, ((2**62, vectors),))


def paths(lines: Lines) -> None:
    """One vector: rotation and rounding inside the product, or by one kernel before it."""
    usual, widest = cuda_products._path, cuda_products._WIDEST_ROTATED
    cuda_products._WIDEST_ROTATED = 2**62
    before = functools.partial(_before, usual)
    for rows, columns in ((4096, 4096), (6144, 4096), (11008, 4096), (14336, 4096), (28672, 4096), (4096, 11008)):
        _time_paths(lines, rows, columns, {"inside": usual, "before": before})
    for rows, columns in ((4096, 14336), (8192, 28672)):
        _time_paths(lines, rows, columns, {"inside": usual, "before": before})
    cuda_products._path, cuda_products._WIDEST_ROTATED = usual, widest


def _before(usual: Callable[..., int], batch: int, rows: int, columns: int, fusable: bool) -> int:
    return usual(batch, rows, columns, False)


def _time_paths(lines: Lines, rows: int, columns: int, ways: dict[str, Callable[..., int]]) -> None:
    for name in ("itq3s", "int4 g128 sym", "int3 g128 sym"):
        weights = copies(name, rows, columns)
        x = torch.randn(1, columns, device=DEVICE, generator=generator(9)).bfloat16()
        found = {}
        for way, path in ways.items():
            cuda_products._path = path
            found[way] = round(1e6 * timed(calls(weights, x, rows, columns), 320 if rows * columns < 1e8 else 0), 2)
        lines.add("paths", shape=f"{rows}x{columns}", format=name, us=found)
        del weights
        torch.cuda.empty_cache()

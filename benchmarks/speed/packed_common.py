"""What the rows of packed_products.py share: weights in the kernels' order, calls of them, lines of results."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import random_weights
import torch
from torch import Tensor
from torch.nn import functional

from ptq.runtime.benchmark import median_seconds
from ptq.runtime.cuda_products import CudaWeight

DEVICE = torch.device("cuda")
SHAPES = {
    "4096x4096": (4096, 4096),
    "11008x4096": (11008, 4096),
    "4096x11008": (4096, 11008),
    "8192x28672": (8192, 28672),
}
FORMATS: dict[str, tuple[int, int, bool]] = {
    "itq3s": (0, 64, False),
    "int3 g128 sym": (3, 128, False),
    "int4 g128 sym": (4, 128, False),
    "int4 g64 asym": (4, 64, True),
    "int4 g32 sym": (4, 32, False),
    "int3 g64 asym": (3, 64, True),
    "int2 g64 sym": (2, 64, False),
    "int8 g128 sym": (8, 128, False),
}
START = time.monotonic()


class Lines:
    """Results, written and shown as they come."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def add(self, row: str, **values: Any) -> None:
        line = json.dumps({"row": row, "at": round(time.monotonic() - START, 1), **values})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def generator(seed: int = 0) -> torch.Generator:
    """On the card."""
    return random_weights.generator(DEVICE, seed)


def random_cuda(name: str, rows: int, columns: int, seed: int = 0) -> CudaWeight:
    """A weight in the kernels' order, of random bits."""
    bits, group, asymmetric = FORMATS[name]
    tiles, blocks = -(-rows // 16), -(-columns // 256)
    g = generator(seed)
    codes = torch.empty(tiles, blocks, bits or 3, 32, 4, dtype=torch.int32, device=DEVICE).random_(
        -(2**31), 2**31, generator=g
    )
    if bits == 0:
        scale = (
            torch.full((tiles, blocks, 8, 2), 0.0173 / columns**0.5, device=DEVICE).half().view(torch.int16).int()
            & 0xFFFF
        )
        picks = torch.empty(tiles, blocks, 8, 2, dtype=torch.int32, device=DEVICE).random_(0, 2**15, generator=g)
        signs = torch.empty(blocks, 8, dtype=torch.int32, device=DEVICE).random_(-(2**31), 2**31, generator=g)
        return CudaWeight(0, 64, codes, scale | (picks << 16), None, signs)
    scales = torch.rand(tiles, blocks, 8, 256 // group, 2, device=DEVICE, generator=g)
    scales = ((scales - 0.5) * (0.2 / columns**0.5 / 0.011) * 0.04).half()
    zeros = None
    if asymmetric:
        shape = scales.shape[:-1] if bits <= 4 else scales.shape
        zeros = torch.randint(0, 256, shape, device=DEVICE, generator=g, dtype=torch.int64).to(torch.uint8)
    return CudaWeight(bits, group, codes, scales, zeros)


def size(w: CudaWeight) -> int:
    return sum(t.numel() * t.element_size() for t in (w.codes, w.scales, w.zeros) if t is not None)


def call(w: CudaWeight, x: Tensor, rows: int, columns: int) -> Tensor:
    result: Tensor = torch.ops.ptq_cuda.product(
        x, w.codes, w.scales, w.zeros, w.signs, None, w.format, w.group, rows, columns
    )
    return result


def calls(weights: list[CudaWeight], x: Tensor, rows: int, columns: int) -> list[Callable[[], object]]:
    return [functools.partial(call, w, x, rows, columns) for w in weights]


def timed(calls: Sequence[Callable[[], object]], least: int = 320) -> float:
    """Median seconds per call of a graph of them all, repeated to at least ``least`` launches."""
    return median_seconds(calls, DEVICE, budget=0.1, launches=least)


def copies(name: str, rows: int, columns: int) -> list[CudaWeight]:
    first = random_cuda(name, rows, columns)
    count = min(400, max(3, -(-1_000_000_000 // size(first))))
    return [first, *(random_cuda(name, rows, columns, seed) for seed in range(1, count))]


def dense_seconds(rows: int, columns: int, batch: int) -> float:
    count = max(2, -(-1_000_000_000 // (rows * columns * 2)))
    weights = [torch.randn(rows, columns, device=DEVICE, generator=generator(i)).bfloat16() for i in range(count)]
    x = torch.randn(batch, columns, device=DEVICE).bfloat16()
    return timed([lambda w=w: functional.linear(x, w) for w in weights], least=24 if batch <= 64 else 0)


def torch_int4_seconds(rows: int, columns: int, batch: int) -> float | None:
    try:
        count = min(120, max(3, -(-1_000_000_000 // (rows * columns // 2))))
        packed = []
        for i in range(count):
            codes = torch.randint(
                0, 256, (rows, columns // 2), device=DEVICE, generator=generator(i), dtype=torch.int64
            )
            packed.append(torch.ops.aten._convert_weight_to_int4pack(codes.to(torch.uint8), 8))
        scales = torch.rand(columns // 128, rows, 2, device=DEVICE).bfloat16() * 0.01
        x = torch.randn(batch, columns, device=DEVICE).bfloat16()
        return timed([lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in packed], least=60)
    except Exception as error:
        print("torch int4:", repr(error)[:150])
        return None

"""The CUDA kernels on this card: right against the reference, then how fast, each result a line of JSON at once.

    python benchmarks/speed/packed_products.py --out kernels.jsonl --rows correct,one,batches,decode

One H100 takes about three minutes, and one more where the kernels must be compiled first. Timings are medians of CUDA
graphs over at least 1 GB of distinct weights; per cent are of the copy bandwidth of the same run (read + written).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq import Scheme
from ptq.runtime import cuda_products
from ptq.runtime.cuda_products import CudaWeight
from ptq.runtime.dispatch import PackedWeight, dequantized_tiles
from ptq.transforms.hadamard import InputRotation

DEVICE = "cuda"
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
    return torch.Generator(device=DEVICE).manual_seed(seed)


def random_weight(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> PackedWeight:
    """A packed weight of random bits and sane scales; one row and one group of zeros."""
    tensors = {}
    for key, (shape, dtype) in scheme.number_format.tensor_specs(rows, columns, scheme).items():
        if dtype == torch.int64:
            tensors[key] = torch.tensor([rows, columns], device=DEVICE)
        elif dtype == torch.int32:
            wide = torch.randint(-(2**31), 2**31, shape, device=DEVICE, generator=generator(seed), dtype=torch.int64)
            tensors[key] = wide.to(torch.int32)
        else:
            scale = torch.rand(shape, device=DEVICE, generator=generator(seed + 1)) * 0.02 + 0.001
            scale[min(1, rows - 1)] = 0
            tensors[key] = scale.to(dtype)
    if scheme.format == "itq3s":
        words = tensors["weight_packed"]
        starts = range(0, words.shape[1], 25)
        for start in starts:
            scale = (torch.rand(rows, device=DEVICE, generator=generator(start)) * 9e-4 + 1e-4).half()
            scale[min(1, rows - 1)] = 0
            words[:, start] = (words[:, start] & ~0xFFFF) | (scale.view(torch.int16).int() & 0xFFFF)
    return PackedWeight(tensors, scheme, rows, columns)


def correct(lines: Lines) -> None:
    schemes = [
        Scheme(bits, symmetric=symmetric, group_size=group, scale_dtype=dtype)  # type: ignore[arg-type]
        for bits in (2, 3, 4, 8)
        for group in (32, 64, 128, 96, 256, None)
        for symmetric in (True, False)
        for dtype in (("float16", "bfloat16") if group == 64 else ("float16",))
    ]
    schemes.append(Scheme.of("itq3s"))
    worst: dict[str, float] = {}
    failures = 0
    for scheme in schemes:
        for rows, columns in ((37, 640), (16, 576), (64, 4096), (21, 500), (130, 5120)):
            if scheme.number_format.unsupported_reason(rows, columns, scheme):
                continue
            try:
                failures += _check_weight(lines, scheme, rows, columns, worst)
            except Exception as error:
                failures += 1
                lines.add("correct", ok=False, scheme=scheme.describe(), shape=[rows, columns], error=repr(error)[:300])
                torch.cuda.synchronize()
    lines.add(
        "correct", schemes=len(schemes), failures=failures, worst={k: float(f"{v:.2g}") for k, v in worst.items()}
    )
    special_values(lines)


def _check_weight(lines: Lines, scheme: Scheme, rows: int, columns: int, worst: dict[str, float]) -> int:
    weight = random_weight(scheme, rows, columns)
    dense = torch.cat([tile for _, tile in dequantized_tiles(weight, torch.float32)])
    rotates = scheme.input_rotation is not None
    made = PackedWeight(
        weight.tensors, scheme, rows, columns, prepared=cuda_products.prepare(weight), rotated=not rotates
    )
    failures = 0
    for dtype in (torch.bfloat16, torch.float16):
        difference = (cuda_products.dequantized(made, dtype).float() - dense.to(dtype).float()).abs().max().item()
        if difference > 1e-25:
            failures += 1
            lines.add(
                "correct",
                ok=False,
                what="dequantized",
                scheme=scheme.describe(),
                shape=[rows, columns],
                difference=difference,
            )
        rotation = InputRotation.of(scheme.input_rotation, columns) if scheme.input_rotation is not None else None
        bias = torch.randn(rows, device=DEVICE, generator=generator(5)).to(dtype)
        for batch in (1, 2, 4, 5, 8, 13, 16, 40, 70):
            x = torch.randn(batch, columns, device=DEVICE, generator=generator(batch)).to(dtype)
            got = cuda_products.product(x, made, bias).double()
            wide = x.double() if rotation is None else rotation(x.double())
            slow = wide @ dense.double().T + bias.double()
            error = ((got - slow).norm() / slow.norm()).item()
            arithmetic = "16 bit" if batch <= 4 or (16 < batch <= 64 and batch % 16 in range(1, 5)) else "8 bit"
            arithmetic = "dense" if batch > 64 else arithmetic
            near = {"16 bit": 4e-3, "8 bit": 1.5e-2, "dense": 6e-3}[arithmetic]
            if dtype == torch.float16:
                near = {"16 bit": 8e-4, "8 bit": 1.5e-2, "dense": 2e-3}[arithmetic]
            name = f"{arithmetic} {str(dtype)[6:]}"
            worst[name] = max(worst.get(name, 0.0), error)
            if not error < near:
                failures += 1
                lines.add(
                    "correct",
                    ok=False,
                    scheme=scheme.describe(),
                    shape=[rows, columns],
                    batch=batch,
                    dtype=str(dtype),
                    error=error,
                )
    return failures


def special_values(lines: Lines) -> None:
    """NaN and infinity, and a chain of dependent products with and without early launches."""
    weight = random_weight(Scheme(4, group_size=64, scale_dtype="float16"), 48, 512)
    made = PackedWeight(weight.tensors, weight.scheme, 48, 512, prepared=cuda_products.prepare(weight))
    for value in ("nan", "inf", "-inf"):
        for batch in (1, 3, 7):
            x = torch.ones(batch, 512, device=DEVICE, dtype=torch.bfloat16)
            x[batch - 1, 300] = float(value)
            y = cuda_products.product(x, made, None)
            lines.add(
                "special",
                value=value,
                batch=batch,
                others_finite=bool(torch.isfinite(y[:-1]).all()),
                not_finite=int((~torch.isfinite(y[-1])).sum()),
                of=48,
            )
    zeros = cuda_products.product(torch.zeros(2, 512, device=DEVICE, dtype=torch.bfloat16), made, None)
    lines.add("special", value="zeros", all_zero=bool((zeros == 0).all()))
    for name in ("itq3s", "int4 g128 sym"):
        weights = [random_cuda(name, 4096, 4096, seed) for seed in range(8)]
        x0 = torch.randn(1, 4096, device=DEVICE, generator=generator(3)).bfloat16()
        outs = []
        for pdl in ("0", "1"):
            os.environ["PTQ_PDL"] = pdl
            y = torch.empty_like(x0)

            def chain(y: Tensor = y, weights: list[CudaWeight] = weights, x0: Tensor = x0) -> None:
                x = x0.clone()
                for w in weights:
                    x = call(w, x, 4096, 4096)
                    x = x / x.float().pow(2).mean().sqrt()
                    x = x.bfloat16()
                y.copy_(x)

            graph = captured(chain)
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            outs.append(y.clone())
        lines.add(
            "special",
            value="chain with early launches",
            format=name,
            equal=bool(torch.equal(*outs)),
            finite=bool(torch.isfinite(outs[1]).all()),
        )


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


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def median_seconds(graph: torch.cuda.CUDAGraph, repeats: int = 15, budget: float = 0.1) -> float:
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    taken: list[float] = []
    start = time.monotonic()
    while len(taken) < repeats and (time.monotonic() - start < budget or len(taken) < 5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after) * 1e-3)
    return sorted(taken)[len(taken) // 2]


def timed(calls: list[Callable[[], object]], least: int = 320) -> float:
    """Median seconds per call of a graph of them all, repeated to at least ``least`` launches."""
    rounds = max(1, least // len(calls)) if least else 1

    def all_of_them() -> None:
        for _ in range(rounds):
            for one in calls:
                one()

    return median_seconds(captured(all_of_them)) / (rounds * len(calls))


def copy_bandwidth() -> float:
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    b = torch.empty_like(a)
    return 2 * a.numel() / timed([lambda: b.copy_(a)], least=4)


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
                usual = cuda_products._IN_SIXTEENS
                forced = {"": usual, " dense": ((2**62, 0),), " in sixteens": ((2**62, 4096),)}
                for how, switch in forced.items() if 16 < batch <= 256 else (("", usual),):
                    cuda_products._IN_SIXTEENS = switch
                    found[name + how] = timed(calls(weights, x, rows, columns), least)
                cuda_products._IN_SIXTEENS = usual
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


LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS, VOCABULARY, CACHE = 32, 4096, 14336, 32, 8, 128256, 512
HEAD = HIDDEN // HEADS
LINEARS = {
    "separate": {
        "q": (HIDDEN, HIDDEN),
        "k": (1024, HIDDEN),
        "v": (1024, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate": (MIDDLE, HIDDEN),
        "up": (MIDDLE, HIDDEN),
        "down": (HIDDEN, MIDDLE),
    },
    "merged": {"qkv": (6144, HIDDEN), "o": (HIDDEN, HIDDEN), "gateup": (2 * MIDDLE, HIDDEN), "down": (HIDDEN, MIDDLE)},
}


def decode(lines: Lines) -> None:
    """A whole decode step of an 8B-shaped random model: norms, rotary, attention over 512 keys, head, argmax."""
    base: dict[str, float] = {}
    for form in LINEARS:
        for name in ("bf16", "itq3s", "int4 g128 sym", "int3 g128 sym"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds = _decode_seconds(form, name)
            except Exception as error:
                lines.add("decode", form=form, format=name, error=repr(error)[:400])
                traceback.print_exc()
                continue
            base.setdefault("bf16", seconds)
            base["bf16"] = min(base["bf16"], seconds) if name == "bf16" else base["bf16"]
            lines.add(
                "decode",
                form=form,
                format=name,
                ms=round(seconds * 1e3, 3),
                tokens_per_second=round(1 / seconds, 1),
                times_bf16=round(base["bf16"] / seconds, 2),
                peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            )


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    added = x + y
    return added, _norm(added, weight)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _decode_seconds(form: str, name: str) -> float:
    made: list[dict[str, Callable[[Tensor], Tensor]]] = []
    for layer, (key, (rows, columns)) in itertools.product(range(LAYERS), LINEARS[form].items()):
        if key == next(iter(LINEARS[form])):
            made.append({})
        if name == "bf16":
            dense = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(0, columns**-0.5)
            made[layer][key] = lambda x, w=dense: functional.linear(x, w)
        else:
            packed = random_cuda(name, rows, columns, layer)
            made[layer][key] = lambda x, w=packed, r=rows, c=columns: call(w, x, r, c)
    embedding = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
    head = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    keys = torch.zeros(LAYERS, 2, 1, KV_HEADS, CACHE, HEAD, dtype=torch.bfloat16, device=DEVICE)
    position = torch.tensor([CACHE - 2], device=DEVICE)
    mask = (torch.arange(CACHE, device=DEVICE) <= CACHE - 2)[None, None, None]
    angle = torch.rand(1, 1, 1, HEAD, device=DEVICE)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    token = torch.tensor([[1]], device=DEVICE)
    norm, add_norm, gate, rotary = (torch.compile(f) for f in (_norm, _add_norm, _gate, _rotary))

    def step() -> None:
        h = functional.embedding(token, embedding)
        x = norm(h, ones)
        for layer in range(LAYERS):
            linear = made[layer]
            if form == "merged":
                q, k, v = linear["qkv"](x).split((HIDDEN, KV_HEADS * HEAD, KV_HEADS * HEAD), -1)
            else:
                q, k, v = linear["q"](x), linear["k"](x), linear["v"](x)
            q, k = rotary(q.view(1, HEADS, 1, HEAD), cos, sin), rotary(k.view(1, KV_HEADS, 1, HEAD), cos, sin)
            keys[layer, 0].index_copy_(2, position, k)
            keys[layer, 1].index_copy_(2, position, v.view(1, KV_HEADS, 1, HEAD))
            attended = functional.scaled_dot_product_attention(q, keys[layer, 0], keys[layer, 1], mask, enable_gqa=True)
            h, x = add_norm(h, linear["o"](attended.reshape(1, 1, HIDDEN)), ones)
            if form == "merged":
                a, b = linear["gateup"](x).chunk(2, -1)
            else:
                a, b = linear["gate"](x), linear["up"](x)
            h, x = add_norm(h, linear["down"](gate(a, b)), ones)
        token.copy_(functional.linear(x, head).argmax(-1))

    step()
    return median_seconds(captured(step), budget=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--rows", default="correct,one,decode,batches")
    arguments = parser.parse_args()
    lines = Lines(arguments.out)
    device = torch.cuda.get_device_properties(0)
    started = time.monotonic()
    reason = cuda_products._missing(0)
    lines.add(
        "machine",
        name=device.name,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        missing=reason,
        library_seconds=round(time.monotonic() - started, 1),
    )
    if reason is not None:
        raise SystemExit(1)
    copy = copy_bandwidth()
    lines.add("machine", copy_tb_per_s=round(copy / 1e12, 3))
    rows: dict[str, Callable[[], None]] = {
        "correct": lambda: correct(lines),
        "one": lambda: one(lines, copy),
        "batches": lambda: batches(lines, copy),
        "decode": lambda: decode(lines),
    }
    with torch.no_grad():
        for name in arguments.rows.split(","):
            try:
                rows[name]()
            except Exception as error:
                lines.add(name, error=repr(error)[:400])
                traceback.print_exc()
    lines.add("done", seconds=round(time.monotonic() - START, 1))


if __name__ == "__main__":
    main()

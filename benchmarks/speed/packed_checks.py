"""The row ``correct`` of packed_products.py: every CUDA kernel against the reference."""

from __future__ import annotations

import os

import torch
from packed_common import DEVICE, Lines, call, generator, random_cuda
from random_weights import random_weight
from torch import Tensor

from ptq import Scheme
from ptq.runtime import cuda_products
from ptq.runtime.benchmark import captured
from ptq.runtime.cuda_products import CudaWeight
from ptq.runtime.dispatch import PackedWeight, dequantized_tiles
from ptq.transforms.hadamard import InputRotation


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

            graph = captured([chain])
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

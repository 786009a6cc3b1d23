"""The row ``decode`` of packed_products.py: a whole step of an 8B-shaped model, with nothing of transformers in it."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable

import torch
from packed_common import DEVICE, Lines, call, random_cuda
from torch import Tensor
from torch.nn import functional

from ptq.runtime.benchmark import captured, median_replay

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

    return median_replay(captured([step]))

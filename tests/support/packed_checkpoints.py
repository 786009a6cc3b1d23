"""Tiny checkpoints that are quantized already, each with its dense weights by a slow formula of its own."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny_models import tiny_model

GROUP = 32
UP = "model.layers.0.mlp.up_proj"
LINEARS = ("model.layers.0.self_attn.k_proj", UP, "model.layers.0.mlp.down_proj")


class Packed(NamedTuple):
    """A weight in some layout: its tensors by their role, and the dense weight ``[out, in]`` by a slow formula."""

    tensors: dict[str, Tensor]
    dense: Tensor


def words(codes: list[int], bits: int) -> list[int]:
    """A little-endian bit stream cut into signed words of 32 bits, by one large integer."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    count = math.ceil(len(codes) * bits / 32)
    unsigned = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


def drawn(shape: tuple[int, ...], top: int, seed: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def scales_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def gptq(out: int, width: int, seed: int, bits: int, *, off: int = 1, act_order: bool = False) -> Packed:
    groups = math.ceil(width / GROUP)
    codes, zeros = drawn((width, out), 2**bits, seed), drawn((groups, out), 2**bits, seed + 1)
    scales = scales_of((groups, out), seed).half()
    index = torch.arange(width) // GROUP
    if act_order:
        index = index[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]
    dense = torch.empty(out, width)
    for i in range(width):
        for j in range(out):
            group = int(index[i])
            dense[j, i] = (int(codes[i, j]) - int(zeros[group, j])) * float(scales[group, j])
    stored = (zeros - off) % 2**bits
    tensors = {
        "qweight": torch.tensor([words(column.tolist(), bits) for column in codes.T], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([words(row.tolist(), bits) for row in stored], dtype=torch.int32),
        "scales": scales,
        "g_idx": index.to(torch.int32),
    }
    return Packed(tensors, dense)


def awq(out: int, width: int, seed: int) -> Packed:
    groups = math.ceil(width / GROUP)
    codes, zeros = drawn((width, out), 16, seed), drawn((groups, out), 16, seed + 1)
    scales = scales_of((groups, out), seed).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map: nibble i of a word holds channel order[i]

    def pack(matrix: Tensor) -> Tensor:
        rows = [[row[8 * word + order[i]] for word in range(out // 8) for i in range(8)] for row in matrix.tolist()]
        return torch.tensor([words(row, 4) for row in rows], dtype=torch.int32)

    dense = torch.empty(out, width)
    for i in range(width):
        for j in range(out):
            group = i // GROUP
            dense[j, i] = (int(codes[i, j]) - int(zeros[group, j])) * float(scales[group, j])
    return Packed({"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, dense)


def fp8(out: int, width: int, seed: int, block: tuple[int, int] | None, *, inverse: bool = True) -> Packed:
    weight = (torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 100).to(torch.float8_e4m3fn)
    suffix = "weight_scale_inv" if inverse else "weight_scale"
    if block is None:
        return Packed({"weight": weight, suffix: torch.tensor(0.001)}, weight.float() * 0.001)
    scale = scales_of((math.ceil(out / block[0]), math.ceil(width / block[1])), seed)
    dense = torch.empty(out, width)
    for i in range(out):
        for j in range(width):
            dense[i, j] = float(weight[i, j].float()) * float(scale[i // block[0], j // block[1]])
    return Packed({"weight": weight, suffix: scale}, dense)


def compressed(out: int, width: int, seed: int, bits: int, *, symmetric: bool, channel: bool = False) -> Packed:
    """``pack-quantized``: ``u = q + 2^(bits-1)`` along the input, zero points likewise along the output."""
    size = width if channel else GROUP
    groups = math.ceil(width / size)
    codes, zeros = drawn((out, width), 2**bits, seed), drawn((out, groups), 2**bits, seed + 1)
    if symmetric:
        zeros = torch.full((out, groups), 2 ** (bits - 1))
    scale = scales_of((out, groups), seed).bfloat16()
    dense = torch.empty(out, width)
    for i in range(out):
        for j in range(width):
            dense[i, j] = (int(codes[i, j]) - int(zeros[i, j // size])) * float(scale[i, j // size])
    tensors = {
        "weight_packed": torch.tensor([words(row.tolist(), bits) for row in codes], dtype=torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([out, width]),
    }
    if not symmetric:
        packed = [words(column.tolist(), bits) for column in zeros.T]
        tensors["weight_zero_point"] = torch.tensor(packed, dtype=torch.int32).T.contiguous()
    return Packed(tensors, dense)


def eight_bits(out: int, width: int, seed: int, dtype: torch.dtype, per: str) -> Packed:
    """``int-quantized`` and ``float-quantized``: a byte a weight, a scale per tensor or per channel."""
    weight = (torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 30).clamp(-120, 120).to(dtype)
    scale = scales_of((out, 1) if per == "channel" else (1,), seed).bfloat16()
    return Packed({"weight": weight, "weight_scale": scale}, weight.float() * scale.float())


def group(bits: int, kind: str = "int", **changes: Any) -> dict[str, Any]:
    args = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", "group_size": GROUP} | changes
    return {"group_0": {"targets": ["Linear"], "weights": args}}


def ct(layout: str, groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"], "config_groups": groups}


@functools.cache
def llama(dtype: torch.dtype) -> Any:
    return tiny_model("llama", dtype, num_hidden_layers=1)


Make = Callable[[int, int, int], Packed]
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False, "sym": False}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 40]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
CHANNEL = {"strategy": "channel", "group_size": None}
CASES: dict[str, tuple[dict[str, Any], float, Make]] = {
    **{f"gptq-{b}": (GPTQ | {"bits": b}, b, lambda o, i, s, b=b: gptq(o, i, s, b)) for b in (2, 3, 4, 8)},
    "gptq-act-order": (GPTQ | {"bits": 4, "desc_act": True}, 4, lambda o, i, s: gptq(o, i, s, 4, act_order=True)),
    "gptq-v2": (GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}, 4, lambda o, i, s: gptq(o, i, s, 4, off=0)),
    "awq": (AWQ, 4, awq),
    "fp8-tensor": ({"quant_method": "fp8"}, 8, lambda o, i, s: fp8(o, i, s, None, inverse=False)),
    "fp8-block": (BLOCKS, 8, lambda o, i, s: fp8(o, i, s, (32, 40))),
    "fp8-128": (BLOCKS | {"weight_block_size": [128, 128]}, 8, lambda o, i, s: fp8(o, i, s, (128, 128))),
    "fp8-channel": ({"quant_method": "fbgemm_fp8"}, 8, lambda o, i, s: fp8(o, i, s, (1, i), inverse=False)),
    "fp8-modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8, lambda o, i, s: fp8(o, i, s, None)),
    **{
        f"ct-{b}-{'sym' if y else 'asym'}": (
            ct("pack-quantized", group(b, symmetric=y)),
            b,
            lambda o, i, s, b=b, y=y: compressed(o, i, s, b, symmetric=y),
        )
        for b in (3, 4, 8)
        for y in (True, False)
    },
    "ct-channel": (
        ct("pack-quantized", group(4, **CHANNEL)),
        4,
        lambda o, i, s: compressed(o, i, s, 4, symmetric=True, channel=True),
    ),
    "ct-int8": (
        ct("int-quantized", group(8, **CHANNEL)),
        8,
        lambda o, i, s: eight_bits(o, i, s, torch.int8, "channel"),
    ),
    "ct-fp8-channel": (
        ct("float-quantized", group(8, "float", **CHANNEL)),
        8,
        lambda o, i, s: eight_bits(o, i, s, torch.float8_e4m3fn, "channel"),
    ),
    "ct-fp8-tensor": (
        ct("float-quantized", group(8, "float", strategy="tensor", group_size=None)),
        8,
        lambda o, i, s: eight_bits(o, i, s, torch.float8_e4m3fn, "tensor"),
    ),
}


def write(
    folder: Path,
    config: dict[str, Any],
    make: Make,
    dtype: torch.dtype = torch.float32,
    linears: tuple[str, ...] = LINEARS,
) -> dict[str, Tensor]:
    """A one-block Llama of which some linears are packed; returns their dense weights by name."""
    llama(dtype).save_pretrained(folder)
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    dense = {}
    for seed, name in enumerate(linears):
        out, width = tensors.pop(f"{name}.weight").shape
        packed = make(out, width, seed)
        dense[f"{name}.weight"] = packed.dense
        tensors |= {f"{name}.{role}": tensor for role, tensor in packed.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=config)
    return dense


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Replace a tensor of the folder, or take it out."""
    file = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items() if key != name}
    save_file(tensors | ({} if tensor is None else {name: tensor}), file, metadata={"format": "pt"})

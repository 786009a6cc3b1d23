"""Packed weights of random bits and sane scales, made on their device: for timing and for comparing kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq import Scheme
from ptq.runtime.dispatch import PackedWeight
from ptq.runtime.linear import QuantLinear

__all__ = ["generator", "random_linear", "random_weight"]

_ITQ3S_WORDS = 25  # of a block of 256 weights


def generator(device: torch.device | str, seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator(device=device).manual_seed(seed)


def random_weight(
    scheme: Scheme, rows: int, columns: int, seed: int = 0, device: torch.device | str = "cuda"
) -> PackedWeight:
    """A packed weight, integers or ``itq3s``; the scales of row 1 are zero."""
    tensors = {}
    for key, (shape, dtype) in scheme.number_format.tensor_specs(rows, columns, scheme).items():
        if dtype == torch.int64:
            tensors[key] = torch.tensor([rows, columns], device=device)
        elif dtype == torch.int32:
            words = torch.empty(shape, dtype=torch.int32, device=device)
            tensors[key] = words.random_(-(2**31), 2**31 - 1, generator=generator(device, seed))
        else:
            scale = torch.rand(shape, device=device, generator=generator(device, seed + 1)) * 0.02 + 0.001
            scale[min(1, rows - 1)] = 0
            tensors[key] = scale.to(dtype)
    if scheme.format == "itq3s":
        _set_block_scales(tensors["weight_packed"])
    return PackedWeight(tensors, scheme, rows, columns)


def random_linear(
    scheme: Scheme, rows: int, columns: int, seed: int = 0, device: torch.device | str = "cuda"
) -> QuantLinear:
    """A packed linear for bfloat16 activations whose outputs are about as large as its inputs."""
    layer = QuantLinear(columns, rows, scheme, device=device, dtype=torch.bfloat16)
    for key, tensor in random_weight(scheme, rows, columns, seed, device).tensors.items():
        small = key == "weight_scale"
        setattr(layer, key, tensor * (0.4 / 2**scheme.bits * columns**-0.5 * 100) if small else tensor)
    return layer.eval()


def _set_block_scales(words: Tensor) -> None:
    rows = len(words)
    for start in range(0, words.shape[1], _ITQ3S_WORDS):
        drawn = torch.rand(rows, device=words.device, generator=generator(words.device, start))
        scale = (drawn * 9e-4 + 1e-4).half()
        scale[min(1, rows - 1)] = 0
        words[:, start] = (words[:, start] & ~0xFFFF) | (scale.view(torch.int16).int() & 0xFFFF)

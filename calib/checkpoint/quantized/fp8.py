"""FP8 checkpoints: a weight of 8-bit floats times a scale per tensor, per channel, or per block.

The scale of the weight ``X`` is ``X_scale_inv`` (DeepSeek, transformers' ``fp8``; in spite of its name the weight is
multiplied by it) or ``X_scale``. With ``weight_block_size [a, b]`` it has one entry for every ``a x b`` block, the last
ones ragged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calib.checkpoint.quantized.packed import PackedWeight
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError

__all__ = ["fp8_weights"]

_SUFFIXES = ("_scale_inv", "_scale")


def fp8_weights(folder: str, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[PackedWeight]:
    """All weights of an FP8 checkpoint.

    Args:
        folder: for messages.
        stored: the tensors in the files.
        config: the ``quantization_config``.

    Raises:
        ModelError: a weight without a scale, a scale of another shape, block sizes that are none.
    """
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise ModelError(f"{folder}: weight_block_size is {block!r}, not two sizes such as [128, 128].")
    for name in stored:
        owner = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(f"weight{suffix}")), None)
        if owner is not None and owner in stored and not _is_fp8(stored[owner]):
            raise ModelError(f"{owner} has a scale ({name}), but is stored as {stored[owner].dtype} and not as FP8.")
    return [_fp8(name, stored, block) for name, tensor in stored.items() if _is_fp8(tensor) and len(tensor.shape) > 1]


def _is_fp8(tensor: StoredTensor) -> bool:
    return tensor.dtype.startswith(("F8_E4M3", "F8_E5M2"))


def _fp8(name: str, stored: Mapping[str, StoredTensor], block: list[int] | None) -> PackedWeight:
    found = next((name + suffix for suffix in _SUFFIXES if name + suffix in stored), None)
    if found is None:
        raise ModelError(f"{name} is stored in FP8, but the checkpoint has no {name}_scale_inv or {name}_scale for it.")
    shape, scale = stored[name].shape, stored[found].shape
    blocks = None if block is None else _blocks(shape, block)
    if scale != blocks and math.prod(scale) != 1 and not _broadcasts(scale, shape):
        wanted = "a number, or one per channel" if blocks is None else f"{list(blocks)} for blocks of {block}"
        raise ModelError(
            f"{found} has the shape {list(scale)} for a weight of {list(shape)}; expected {wanted}. Do config and "
            "weights belong together?"
        )
    make = functools.partial(_dequantize, block if scale == blocks else None)
    return PackedWeight(
        name,
        {"weight": name, "scale": found},
        shape,
        8,
        make,
        "fp8" if scale != blocks or block is None else f"fp8 {block[0]} x {block[1]}",
    )


def _broadcasts(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether every size is the weight's or 1, and not all are the weight's."""
    return len(scale) == len(shape) and scale != shape and all(a in (1, b) for a, b in zip(scale, shape, strict=True))


def _blocks(shape: tuple[int, ...], block: list[int]) -> tuple[int, ...]:
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def _dequantize(block: list[int] | None, parts: Mapping[str, Tensor]) -> Tensor:
    weight, scale = parts["weight"].float(), parts["scale"].float()
    if block is not None:
        for dim, size in ((-2, block[0]), (-1, block[1])):
            scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, weight.shape[dim])
    return weight.mul_(scale.reshape(()) if scale.numel() == 1 else scale)

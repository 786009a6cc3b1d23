"""Products with packed weights on GPUs without a CUDA compiler: codes become half precision in a Triton kernel.

The checkpoint's tensors are read as they are. A tile of codes is decoded to the values that the reference multiplies
(float32, rounded to the activations' dtype), and tiles are multiplied on tensor cores with float32 sums, so that a
result differs from the reference's by the order of additions. Many vectors are left to the reference, which dequantizes
a weight once.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from ptq.number_formats.integer import unpack_zeros
from ptq.runtime.dispatch import REFERENCE, Kernel, PackedWeight
from ptq.runtime.extension import say_missing
from ptq.runtime.triton_kernels import BLOCK_COLUMNS, blocks_kernel, has_triton, uniform_kernel
from ptq.scheme import Scheme

__all__ = ["TRITON_PRODUCTS", "prepare", "product", "unsupported_reason"]

_BITS = (2, 3, 4, 8)
_MOST_VECTORS = 64
_BLOCK = 256  # of itq3s
_ROWS = {1: 16, 16: 32, 64: 64}  # of a tile, by the vectors of a tile


def prepare(weight: PackedWeight) -> Tensor | None:
    """Zero points as bytes ``[rows, groups]``, where there are some; nothing else is copied."""
    if weight.scheme.format == "itq3s" or weight.scheme.symmetric:
        return None
    return unpack_zeros(weight.tensors["weight_zero_point"], weight.scheme.bits, weight.out_features)


def unsupported_reason(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a layer is left to another kernel."""
    if scheme.format == "itq3s":
        return f"{in_features} columns are no multiple of {_BLOCK}" if in_features % _BLOCK else _missing()
    if scheme.bits not in _BITS:
        return f"it has no codes of {scheme.bits} bits"
    group = scheme.group_size
    if group is not None and group < in_features and group not in (32, 64) and group % BLOCK_COLUMNS:
        return f"groups of {group} input channels are not 32, 64 or a multiple of {BLOCK_COLUMNS}"
    return _missing()


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``[..., in]`` after its rotation to ``[..., out]``, in the dtype of ``x``."""
    if x.numel() > _MOST_VECTORS * weight.in_features:
        return REFERENCE.product(x, weight, bias)
    tensors, scheme = weight.tensors, weight.scheme
    if scheme.format == "itq3s":
        result = torch.ops.ptq_triton.blocks(x, tensors["weight_packed"], bias)
    else:
        group = scheme.group_size or weight.in_features
        codes, scale = tensors["weight_packed"], tensors["weight_scale"]
        result = torch.ops.ptq_triton.uniform(x, codes, scale, weight.prepared, bias, scheme.bits, group)
    return cast(Tensor, result)


def _uniform(
    x: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    vectors, y, grid, tile = _tiles(x, len(codes))
    columns = x.shape[-1]
    uniform_kernel()[grid](
        vectors,
        codes,
        scale,
        scale if zeros is None else zeros,
        y if bias is None else bias,
        y,
        len(vectors),
        len(codes),
        columns,
        codes.shape[1],
        scale.shape[1],
        min(group, -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS),
        BITS=bits,
        ASYMMETRIC=zeros is not None,
        BIAS=bias is not None,
        GROUPS=max(1, BLOCK_COLUMNS // group),
        COLUMNS=BLOCK_COLUMNS,
        **tile,
    )
    return y.view(*x.shape[:-1], len(codes))


def _blocks(x: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    vectors, y, grid, tile = _tiles(x, len(words))
    blocks_kernel()[grid](
        vectors,
        words,
        y if bias is None else bias,
        y,
        len(vectors),
        len(words),
        x.shape[-1],
        words.shape[1],
        BIAS=bias is not None,
        **tile,
    )
    return y.view(*x.shape[:-1], len(words))


def _tiles(x: Tensor, rows: int) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, int]]:
    """The input as a matrix, room for the result, the grid and the size of a tile."""
    vectors = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(vectors), rows, dtype=x.dtype, device=x.device)
    of_rows = next(tile for most, tile in _ROWS.items() if len(vectors) <= most)
    of_vectors = 16 if len(vectors) <= 16 else 32 if len(vectors) <= 32 else 64
    grid = (-(-rows // of_rows), -(-len(vectors) // of_vectors))
    return vectors, y, grid, {"VECTORS": of_vectors, "ROWS": of_rows}


_OPERATORS = torch.library.Library("ptq_triton", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "uniform(Tensor x, Tensor codes, Tensor scale, Tensor? zeros, Tensor? bias, int bits, int group) -> Tensor"
)
_OPERATORS.define("blocks(Tensor x, Tensor words, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _on_device(function: Any) -> Any:
    """With the input's device current, where it is a GPU."""

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> Tensor:
        with torch.cuda.device(x.device):
            return cast(Tensor, function(x, *rest))

    return run


def _shape(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


for _name, _function in (("uniform", _uniform), ("blocks", _blocks)):
    _OPERATORS.impl(_name, _on_device(_function), "CUDA")  # type: ignore[no-untyped-call]
    _OPERATORS.impl(_name, _shape, "Meta")  # type: ignore[no-untyped-call]


@functools.cache
def _missing() -> str | None:
    """Why this machine has no such kernels, said in a warning if it should have them."""
    if not has_triton():
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        x = torch.zeros(1, _BLOCK, dtype=torch.bfloat16, device="cuda")
        _blocks(x, torch.zeros(16, 25, dtype=torch.int32, device="cuda"), None)
    except Exception as error:  # Triton's compiler, the C compiler it calls and the driver raise what they like
        return say_missing("ptq_triton", " ".join(str(error).split())[:200] or type(error).__name__)
    return None


TRITON_PRODUCTS = Kernel(
    "triton",
    frozenset({"cuda"}),
    frozenset({torch.bfloat16, torch.float16}),
    frozenset({"int", "itq3s"}),
    unsupported_reason,
    product,
    prepare=prepare,
    multiplies="codes decoded in a Triton kernel",
)

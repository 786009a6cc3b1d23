"""Products with packed weights on a CPU: codes become float32 in registers, straight from the checkpoint's tensors.

Weights have exactly the reference's float32 values, and products and sums are float32, so that a result differs from
the reference's by the order of its additions (and is closer to the exact one for half-precision activations, for which
the reference rounds its weights). NaN and infinity behave as in the reference. Nothing is repacked: no memory besides
the checkpoint's tensors. Large batches are dequantized tile by tile and multiplied by the library.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from calib.precision import has_fast_bfloat16
from ptq.grids import SMALLEST_STEP
from ptq.grids.block_scales import exponent_scales
from ptq.grids.codebooks import symmetric_levels
from ptq.grids.floating_point import E2M1
from ptq.grids.sub_block_scales import SubBlockLayout
from ptq.number_formats.rotated.itq3s import Itq3sFormat
from ptq.runtime import dispatch
from ptq.runtime.dispatch import Kernel, PackedWeight
from ptq.runtime.extension import load_operators
from ptq.scheme import Rotation, Scheme
from ptq.transforms.hadamard import InputRotation, hadamard_blocks

__all__ = ["CPU_PRODUCTS"]

_SOURCES = ("cpu_ops.cpp", "packed_avx2.cpp", "packed_avx512.cpp")
_LARGE_BATCH = 128
"""Vectors from which dequantizing once and the library's product is faster than decoding per eight vectors."""
_ALIGNED = 16  # columns that a vector of codes spans: groups are whole vectors


@dataclasses.dataclass(frozen=True)
class _Codes:
    """How a format's codes become values, for the operators.

    Args:
        levels: float32 ``[16]``, what codes of up to 4 bits stand for (repeated for fewer bits).
        zero: subtracted from every level where there are no zero points.
        scale_table: float32 ``[256]``, what a scale of one byte stands for.
        least: scales below it are raised to it.
    """

    levels: Tensor
    zero: float = 0.0
    scale_table: Tensor | None = None
    least: float = -float("inf")


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the operators are called with for one weight: views of its tensors and constants of its format."""

    multiply: Any
    values: Any
    arguments: tuple[object, ...]
    rotation: tuple[Tensor, tuple[int, ...]] | None


def prepare(weight: PackedWeight) -> _Call:
    """The operators and their arguments; nothing is copied."""
    operator, arguments = _call(weight)
    rotation = weight.scheme.input_rotation
    return _Call(
        getattr(torch.ops.ptq_cpu, f"{operator}_product"),
        getattr(torch.ops.ptq_cpu, f"{operator}_values"),
        arguments,
        None if rotation is None else _rotation(rotation, weight.in_features),
    )


def unsupported_reason(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a layer is left to the reference."""
    if scheme.group_size is not None and scheme.group_size % _ALIGNED and scheme.group_size < in_features:
        return f"groups of {scheme.group_size} input channels are no multiple of {_ALIGNED}"
    if scheme.format not in _FORMATS:
        return f"it does not read the number format {scheme.format}"
    return _missing()


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
    ready: _Call = weight.prepared or prepare(weight)
    rotation = None if weight.rotated else ready.rotation
    if x.shape[-1] and x.numel() // x.shape[-1] < _LARGE_BATCH:
        return cast(Tensor, ready.multiply(x, *ready.arguments, bias, *(rotation or (None, ()))))
    work = x if rotation is None else torch.ops.ptq_cpu.rotated(x, *rotation)
    return _large(work, weight, bias, x.dtype)


def dequantized(weight: PackedWeight, rows: slice) -> Tensor:
    """Rows of the weight, float32, bit for bit those of the reference."""
    ready: _Call = weight.prepared or prepare(weight)
    return cast(Tensor, ready.values(*ready.arguments, rows.start, rows.stop))


def _large(x: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # A CPU that emulates bfloat16 multiplies float32 twice as fast; one that has neither emulates float16, too.
    half = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half and not has_fast_bfloat16(x.device) else dtype
    work, step = x.to(wide), max(1, dispatch.TILE_WEIGHTS // weight.in_features)
    bias = None if bias is None else bias.to(dtype).to(wide)
    parts = []
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        tile = dequantized(weight, rows).to(wide)
        parts.append(functional.linear(work, tile, None if bias is None else bias[rows]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


@functools.cache
def _missing() -> str | None:
    """Why this machine has no such kernels."""
    failure = load_operators("ptq_cpu", _SOURCES, ("-fopenmp",))
    if failure is not None:
        return f"they could not be built: {failure}"
    _register_shapes()
    return None if torch.ops.ptq_cpu.vectors() else "this CPU has no AVX2"


def _register_shapes() -> None:
    """What the operators return, without values, for ``torch.compile``."""

    def like_input(x: Tensor, *rest: object) -> Tensor:
        return torch.empty_like(x)

    def product_of(rows: int) -> Callable[..., Tensor]:
        return lambda x, *rest: x.new_empty(*x.shape[:-1], rest[rows])

    def values_of(columns: int) -> Callable[..., Tensor]:
        def values(codes: Tensor, *rest: Any) -> Tensor:
            return codes.new_empty(rest[columns + 2] - rest[columns + 1], rest[columns], dtype=torch.float32)

        return values

    shapes = {
        "rotated": like_input,
        "packed_product": product_of(9),
        "blocks_product": product_of(5),
        "packed_values": values_of(9),
        "blocks_values": values_of(5),
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"ptq_cpu::{name}", shape)


def _call(weight: PackedWeight) -> tuple[str, tuple[object, ...]]:
    """The operator and its arguments, from the rows on."""
    scheme, tensors = weight.scheme, weight.tensors
    shape = (weight.out_features, weight.in_features)
    if isinstance(scheme.number_format, Itq3sFormat):
        layout = scheme.number_format.layout
        return "blocks", (tensors["weight_packed"], *_tables(layout), layout.sub, SMALLEST_STEP, *shape)
    codes = _codes(scheme)
    scale_table = codes.scale_table
    if "weight_global_scale" in tensors:
        scale_table = _e4m3() / tensors["weight_global_scale"]
    group = scheme.group_size or weight.in_features
    zeros = tensors.get("weight_zero_point")
    arguments = (zeros, scale_table, codes.levels, scheme.bits, codes.zero, codes.least, group, *shape)
    return "packed", (tensors["weight_packed"], tensors["weight_scale"], *arguments)


_FORMATS = frozenset({"int", "nvfp4", "mxfp4", "fp4", "e2m1", "higgs", "itq3s", "itq3s-104"})


@functools.lru_cache(maxsize=64)
def _codes(scheme: Scheme) -> _Codes:
    if scheme.format == "int":
        levels = torch.arange(16, dtype=torch.float32) % 2 ** min(scheme.bits, 4)
        return _Codes(levels, float(2 ** (scheme.bits - 1)))
    if scheme.format == "higgs":
        from ptq.grids.codebooks import GAUSSIAN

        levels = symmetric_levels(GAUSSIAN[scheme.bits]).levels
        return _Codes(levels.repeat(16 // len(levels)).contiguous(), least=SMALLEST_STEP)
    exponents = exponent_scales(torch.arange(256, dtype=torch.uint8)) if scheme.format == "mxfp4" else None
    return _Codes(E2M1.values(torch.arange(16)).contiguous(), scale_table=exponents)


@functools.lru_cache(maxsize=4)
def _tables(layout: SubBlockLayout) -> tuple[Tensor, Tensor]:
    """Multipliers, and the magnitudes of the codebook."""
    return torch.tensor(layout.multipliers, dtype=torch.float32), torch.tensor(layout.magnitudes, dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def _rotation(rotation: Rotation, width: int) -> tuple[Tensor, tuple[int, ...]]:
    """Signs int8 and sizes of the blocks."""
    return InputRotation.of(rotation, width).signs, hadamard_blocks(width, rotation.block)


@functools.cache
def _e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


CPU_PRODUCTS = Kernel(
    "cpu",
    frozenset({"cpu"}),
    frozenset({torch.float32, torch.bfloat16, torch.float16}),
    _FORMATS,
    unsupported_reason,
    product,
    prepare=prepare,
    rotates_input=True,
    multiplies="codes decoded in registers",
)

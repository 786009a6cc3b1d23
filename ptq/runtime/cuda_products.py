"""Products with packed weights on NVIDIA GPUs: integer products on tensor cores, decoded in registers.

Activations become 16-bit integers with a scale per 256 channels (8 bits from five vectors on where they are rotated or
``PTQ_INPUT_BITS=8``), integer sums of a group are exact, and groups are added in float32: 3e-5 relative error for 16
bits, 8e-3 for 8. ``PTQ_EXACT=1`` multiplies activations as they are with the dequantized weight instead, and so do
batches above 16 to 128 vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ptq.errors import UsageError
from ptq.number_formats.integer import INTEGER, unpack_zeros
from ptq.number_formats.rotated.itq3s import ITQ3S
from ptq.packing.bits import unpack_rows
from ptq.runtime.cuda_layout import UNIT_COLUMNS, UNIT_ROWS, pack_zeros, repack_blocks, repack_scales, repack_uniform
from ptq.runtime.cuda_library import check, cuda_library, device_capability
from ptq.runtime.cuda_restore import restore_blocks, restore_scales, restore_uniform, unpack_zero_pairs
from ptq.runtime.dispatch import Kernel, Merged, MergeRules, PackedWeight
from ptq.scheme import Rotation, Scheme
from ptq.transforms.hadamard import InputRotation, hadamard_matrix

__all__ = ["CUDA_PRODUCTS", "CudaWeight", "dequantized", "merge", "merge_key", "prepare", "product", "restore"]

_BITS = (2, 3, 4, 8)
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ONE, _ONE_EXACT, _ONE_MANY_ROWS, _FEW, _EIGHT, _SIXTEEN = range(6)
_VECTORS = {_FEW: 4, _EIGHT: 8, _SIXTEEN: 16}
_MOST_VECTORS: dict[str, tuple[tuple[int, int], ...]] = {
    "int": ((2**25, 16), (2**62, 32)),
    "int, 8-bit inputs": ((2**25, 48), (2**62, 112)),
    "itq3s": ((2**25, 96), (2**62, 128)),
}
"""``(weights, vectors)``: in a weight of up to so many numbers, products of few vectors follow each other up to so
many; beyond, it is dequantized once. Measured on an H200 with 4096 x 4096 and 8192 x 28672 (docs/results, kernels)."""
_WIDEST_ROTATED = 16384
"""Columns up to which one vector is rotated inside the product; in wider weights every block would rotate too much:
with 28672 columns and a kernel before it the product takes 26.7 instead of 36.3 microseconds on an H200."""


@dataclasses.dataclass(frozen=True)
class CudaWeight:
    """A weight in the kernels' order (`ptq.runtime.cuda_layout`).

    Args:
        format: 0 for itq3s, else bits of the uniform format.
        group: columns per scale in the kernel.
        codes: int32.
        scales: of every unit; for itq3s with the multipliers.
        zeros: packed zero points; ``None`` for symmetric weights.
        signs: of the input's rotation, int32 ``[blocks, 8]`` bits, where the kernel rotates.
        rotation: the rotation for inputs that the kernel cannot rotate.
    """

    format: int
    group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    signs: Tensor | None = None
    rotation: InputRotation | None = None


def unsupported_reason(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a layer is left to another kernel."""
    if scheme.format == "int":
        if scheme.bits not in _BITS:
            return f"it has no codes of {scheme.bits} bits"
        group = scheme.group_size
        if group is not None and group % 32 and group < in_features:
            return f"groups of {group} input channels are no multiple of 32"
    return _missing(torch.cuda.current_device())


def prepare(weight: PackedWeight) -> CudaWeight:
    """Repack a weight on its device."""
    scheme, tensors = weight.scheme, weight.tensors
    rows, columns = weight.out_features, weight.in_features
    if scheme.format == "itq3s":
        codes, params = ITQ3S.unpack(tensors, scheme, rows, columns)
        packed, scales = repack_blocks(codes, params["scale"], params["multiplier"])
        made = CudaWeight(0, 64, packed, scales, None)
        made = dataclasses.replace(made, **_rotation(scheme, columns, packed.device))
    else:
        group = scheme.group_size or columns
        unit = next((size for size in (128, 64) if group % size == 0 or group >= columns), 32)
        codes = unpack_rows(tensors["weight_packed"], scheme.bits, columns)
        scales = repack_scales(tensors["weight_scale"], group, columns, unit)
        zeros = None
        if not scheme.symmetric:
            points = unpack_zeros(tensors["weight_zero_point"], scheme.bits, rows)
            zeros = pack_zeros(repack_scales(points, group, columns, unit), scheme.bits)
        made = CudaWeight(scheme.bits, unit, repack_uniform(codes, scheme.bits), scales, zeros)
    if made.codes.is_cuda:
        torch.cuda.synchronize(made.codes.device)  # a product may read weights before the kernels in front of it end
    return made


def restore(weight: PackedWeight) -> dict[str, Tensor]:
    """The checkpoint's tensors that a prepared weight holds, bit for bit."""
    made, scheme = cast(CudaWeight, weight.prepared), weight.scheme
    rows, columns = weight.out_features, weight.in_features
    if scheme.format == "itq3s":
        codes, scale, index = restore_blocks(made.codes, made.scales, rows, columns)
        return {"weight_packed": ITQ3S.pack(codes, {"scale": scale, "multiplier": index}, scheme)["weight_packed"]}
    group = scheme.group_size or columns
    params = {"scale": restore_scales(made.scales, group, made.group, rows, columns)}
    if made.zeros is not None:
        points = unpack_zero_pairs(made.zeros, scheme.bits)
        params["zero"] = restore_scales(points, group, made.group, rows, columns)
    tensors = INTEGER.pack(restore_uniform(made.codes, scheme.bits, rows, columns), params, scheme)
    del tensors["weight_shape"]
    if "weight_zero_point" in tensors:  # transposed, and with one column nothing makes its strides regular but a copy
        zeros = tensors["weight_zero_point"]
        tensors["weight_zero_point"] = zeros.clone(memory_format=torch.contiguous_format)
    return tensors


def merge_key(weight: PackedWeight) -> Hashable:
    """Weights with equal keys that read the same input can be one weight."""
    made, scheme = cast(CudaWeight, weight.prepared), weight.scheme
    layout = (made.format, made.group, made.codes.shape[1:], made.scales.dtype, made.zeros is None, made.codes.device)
    return (*layout, weight.in_features, weight.rotated, scheme.input_rotation)


def merge(weights: Sequence[PackedWeight]) -> tuple[PackedWeight, list[Merged]]:
    """One weight of all rows, those of every member filled up to whole tiles."""
    parts = [cast(CudaWeight, weight.prepared) for weight in weights]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    whole = dataclasses.replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )
    members, tile = [], 0
    for weight, part in zip(weights, parts, strict=True):
        tiles = slice(tile, tile + len(part.codes))
        own = dataclasses.replace(
            part,
            codes=whole.codes[tiles],
            scales=whole.scales[tiles],
            zeros=None if whole.zeros is None else whole.zeros[tiles],
        )
        members.append(Merged(dataclasses.replace(weight, prepared=own), tile * UNIT_ROWS))
        tile = tiles.stop
    if whole.codes.is_cuda:
        torch.cuda.synchronize(whole.codes.device)  # as in `prepare`
    return dataclasses.replace(weights[0], prepared=whole, out_features=tile * UNIT_ROWS), members


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``[..., in]`` (rotated or not, see `PackedWeight.rotated`) to ``[..., out]`` in the dtype of ``x``."""
    made: CudaWeight = weight.prepared
    signs = None
    if not weight.rotated:
        few = x.numel() <= weight.in_features * _most_vectors(made.format, weight.out_features, weight.in_features)
        if few and x.dtype == torch.bfloat16:
            signs = made.signs
        if signs is None:
            assert made.rotation is not None
            x = made.rotation.once(x)
    stored = (made.codes, made.scales, made.zeros, signs, bias, made.format, made.group)
    return cast(Tensor, torch.ops.ptq_cuda.product(x, *stored, weight.out_features, weight.in_features))


def _most_vectors(format: int, rows: int, columns: int) -> int:
    table = _MOST_VECTORS["itq3s" if not format else "int, 8-bit inputs" if _eight_bits(format) else "int"]
    return next(most for weights, most in table if rows * columns <= weights)


def _eight_bits(format: int) -> bool:
    """Whether inputs are rounded to 8 bits from five vectors on: those that were rotated (itq3s), which costs next to
    nothing, and others where ``PTQ_INPUT_BITS=8`` says so (KL .015 with 4-bit weights on SmolLM2-135M).

    Raises:
        UsageError: ``PTQ_INPUT_BITS`` is another number.
    """
    asked = os.environ.get("PTQ_INPUT_BITS", "")
    if asked not in ("", "8", "16"):
        raise UsageError(f"PTQ_INPUT_BITS is {asked!r}: inputs of products are rounded to 8 or 16 bits.")
    return asked == "8" if format else asked != "16"


def _parts(vectors: Tensor, format: int) -> tuple[Tensor, ...]:
    """Vectors as the products take them: sixteen at once with 8-bit inputs, four with 16-bit ones."""
    return torch.split(vectors, _VECTORS[_SIXTEEN if _eight_bits(format) else _FEW])


def dequantized(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]``."""
    made: CudaWeight = weight.prepared
    return _dense(
        made.codes, made.scales, made.zeros, made.format, made.group, (weight.out_features, weight.in_features), dtype
    )


def _product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    signs: Tensor | None,
    bias: Tensor | None,
    format: int,
    group: int,
    rows: int,
    columns: int,
) -> Tensor:
    """The operator ``ptq_cuda::product``; with ``signs`` it rotates, too."""
    vectors = x.reshape(-1, columns).contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    if len(vectors) > _most_vectors(format, rows, columns) or os.environ.get("PTQ_EXACT", "") not in ("", "0"):
        if signs is not None:
            signed = (vectors * _plus_minus(signs).to(x.dtype)).view(len(vectors), -1, UNIT_COLUMNS)
            vectors = (signed @ hadamard_matrix(UNIT_COLUMNS, x.dtype, x.device)).flatten(-2)  # float32 sums
        dense = _dense(codes, scales, zeros, format, group, (rows, columns), x.dtype)
        return functional.linear(vectors, dense, bias).view(*x.shape[:-1], rows)
    made = CudaWeight(format, group, codes, scales, zeros, signs)
    with torch.cuda.device(x.device):
        done = [_some(part, made, rows, bias) for part in _parts(vectors, format)]
        result = done[0] if len(done) == 1 else torch.cat(done)
    return result.view(*x.shape[:-1], rows)


def _product_shape(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    signs: Tensor | None,
    bias: Tensor | None,
    format: int,
    group: int,
    rows: int,
    columns: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_OPERATORS = torch.library.Library("ptq_cuda", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "product(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? signs, Tensor? bias, int format, int group, "
    "int rows, int columns) -> Tensor"
)
_OPERATORS.impl("product", _product, "CUDA")  # type: ignore[no-untyped-call]
_OPERATORS.impl("product", _product_shape, "Meta")  # type: ignore[no-untyped-call]


def _dense(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: int,
    group: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    with torch.cuda.device(out.device):
        library: Any = cuda_library(device_capability(out.device))
        code = library.ptq_dequantize(
            format,
            group,
            zeros is not None,
            *_pointers(codes, scales, zeros, out),
            *shape,
            scales.dtype == torch.bfloat16,
            _DTYPES[dtype],
            torch.cuda.current_stream().cuda_stream,
        )
        check(library, code)
    return out


def _plus_minus(signs: Tensor) -> Tensor:
    """Signs as bits to -1 and 1, float32 ``[columns]``."""
    bits = (signs[..., None] >> torch.arange(32, device=signs.device)) & 1
    return (1 - 2 * bits).flatten().float()


def _some(x: Tensor, made: CudaWeight, rows: int, bias: Tensor | None) -> Tensor:
    """At most 16 vectors."""
    library: Any = cuda_library(device_capability(x.device))
    batch, columns = x.shape
    stream, pdl = torch.cuda.current_stream().cuda_stream, _dependent_launch(x.device)
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    if batch == 0:
        return y
    fusable = made.format != 0 or (made.signs is not None and columns <= _WIDEST_ROTATED)
    path = _path(batch, rows, columns, fusable=fusable)
    fragments: tuple[Tensor | None, ...] = (None, None, None)
    if path in _VECTORS:
        fragments = _fragments(x, made, path, library, stream, pdl)
    code = library.ptq_product(
        made.format,
        made.group,
        made.zeros is not None,
        path,
        *_pointers(made.codes, made.scales, made.zeros, *fragments, x, made.signs, bias, y),
        rows,
        columns,
        batch,
        made.scales.dtype == torch.bfloat16,
        _DTYPES[x.dtype],
        _DTYPES[y.dtype],
        pdl,
        stream,
    )
    check(library, code)
    return y


def _fragments(
    x: Tensor, made: CudaWeight, path: int, library: Any, stream: int, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations as integers in the order of tensor cores, their scales and sums."""
    batch, columns = x.shape
    blocks, vectors = -(-columns // UNIT_COLUMNS), _VECTORS[path]
    tiles = 2 if path == _SIXTEEN else 1
    fragments = torch.empty(tiles * blocks * 4 * 8 * 4 * 16, dtype=torch.uint8, device=x.device)
    scales = torch.empty(blocks, vectors, dtype=torch.float32, device=x.device)
    sums = torch.empty(blocks, vectors, 8 if made.group == 32 else 4, dtype=torch.int32, device=x.device)
    code = library.ptq_quantize(
        made.format,
        path,
        made.signs is not None,
        _DTYPES[x.dtype],
        *_pointers(x, made.signs, fragments, scales, sums),
        columns,
        batch,
        made.group,
        pdl,
        stream,
    )
    check(library, code)
    return fragments, scales, sums


def _path(batch: int, rows: int, columns: int, fusable: bool) -> int:
    if batch > 1 or not fusable:
        return _FEW if batch <= 4 else _EIGHT if batch <= 8 else _SIXTEEN
    blocks = -(-columns // UNIT_COLUMNS)
    if blocks == 16 and rows <= 12288:
        return _ONE_EXACT
    return _ONE_MANY_ROWS if blocks <= 16 else _ONE


def _pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _rotation(scheme: Scheme, columns: int, device: torch.device) -> dict[str, Any]:
    """The input's rotation, and its signs as bits where it is the one that the kernel computes."""
    if scheme.input_rotation is None:
        return {}
    rotation = _shared_rotation(scheme.input_rotation, columns)
    if scheme.input_rotation.block != UNIT_COLUMNS or columns % UNIT_COLUMNS:
        return {"rotation": rotation}
    bits = (rotation.signs < 0).view(-1, 8, 32).long() << torch.arange(32)
    words = bits.sum(-1)
    signs = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"rotation": rotation, "signs": signs.to(device).contiguous()}


def _dependent_launch(device: torch.device) -> bool:
    """Whether the next kernel may start early: compute capability 9.0, and not switched off by ``PTQ_PDL=0``."""
    return device_capability(device) >= (9, 0) and os.environ.get("PTQ_PDL", "1") != "0"


@functools.lru_cache(maxsize=4096)
def _shared_rotation(rotation: Rotation, columns: int) -> InputRotation:
    """One for all linears that read the same input, so that it is rotated once."""
    return InputRotation.of(rotation, columns)


@functools.cache
def _missing(index: int) -> str | None:
    library = cuda_library(torch.cuda.get_device_capability(index))
    return library if isinstance(library, str) else None


CUDA_PRODUCTS = Kernel(
    "cuda",
    frozenset({"cuda"}),
    frozenset({torch.bfloat16, torch.float16}),
    frozenset({"int", "itq3s"}),
    unsupported_reason,
    product,
    prepare=prepare,
    rotates_input=True,
    multiplies="codes decoded in the product",
    restore=restore,
    scale_dtypes=frozenset({torch.float16, torch.bfloat16}),
    merging=MergeRules(merge_key, merge, min(most for table in _MOST_VECTORS.values() for _, most in table)),
)

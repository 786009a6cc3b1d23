"""The tensors of one quantized linear, the same in both formats (compressed-tensors calls them ``pack-quantized``).

For a weight ``[out, in]`` stored as module ``X``:

    X.weight_packed      int32  [out, ceil(in*bits/32)]      codes, packed along the input channels
    X.weight_scale       fp16 or bf16  [out, groups]
    X.weight_shape       int64  [2]                          out, in
    X.weight_zero_point  int32  [ceil(out*bits/32), groups]  asymmetric only; packed along the output channels

The value of a weight is ``(code - zero) * scale``; the zero of a symmetric weight is ``2^(bits-1)``. compressed-tensors
reads the same bits as signed numbers, ``code - 2^(bits-1)`` and ``zero - 2^(bits-1)``: the difference is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import OutputError
from ptq.packing.bits import pack_rows, packed_width, unpack_rows
from ptq.quantized import QuantizedWeight
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["layer_tensors", "layer_weight", "tensor_specs", "unpack_zeros"]


def tensor_specs(out_features: int, in_features: int, scheme: Scheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a linear, by its name inside the module."""
    groups = scheme.groups(in_features)
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, packed_width(in_features, scheme.bits)), torch.int32),
        "weight_scale": ((out_features, groups), SCALE_DTYPES[scheme.scale_dtype]),
        "weight_shape": ((2,), torch.int64),
    }
    if not scheme.symmetric:
        specs["weight_zero_point"] = ((packed_width(out_features, scheme.bits), groups), torch.int32)
    return specs


def layer_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store for linear ``name``, by full name, on the CPU, contiguous; an empty name gives bare names.

    Raises:
        ValueError: the weight's scales or zero points do not fit its scheme.
    """
    scheme, (out_features, in_features) = weight.scheme, weight.shape
    if (weight.zero is None) != scheme.symmetric:
        raise ValueError(f"{name}: {scheme.describe()} with{'out' if weight.zero is None else ''} zero points")
    tensors = {
        "weight_packed": pack_rows(weight.codes, scheme.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor([out_features, in_features]),
    }
    if weight.zero is not None:
        tensors["weight_zero_point"] = pack_rows(weight.zero.T, scheme.bits).T
    for key, (shape, dtype) in tensor_specs(out_features, in_features, scheme).items():
        if tuple(tensors[key].shape) != shape or tensors[key].dtype != dtype:
            raise ValueError(f"{name}.{key} is {_show(tensors[key])}, {scheme.describe()} needs {dtype} {list(shape)}")
    prefix = f"{name}." if name else ""
    return {prefix + key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def layer_weight(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `layer_tensors`; an empty name reads bare names.

    Raises:
        OutputError: a tensor is missing or has another shape or dtype than ``scheme`` says.
    """
    prefix = f"{name}." if name else ""
    shape_tensor = tensors.get(f"{prefix}weight_shape")
    if shape_tensor is None or shape_tensor.numel() != 2:
        raise OutputError(f"the checkpoint has no usable {prefix}weight_shape: it is damaged, quantize again.")
    out_features, in_features = (int(size) for size in shape_tensor.tolist())
    for key, (shape, dtype) in tensor_specs(out_features, in_features, scheme).items():
        tensor = tensors.get(prefix + key)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = "missing" if tensor is None else _show(tensor)
            raise OutputError(
                f"{prefix}{key} is {found}, but {scheme.describe()} of {out_features} x {in_features} needs {dtype} "
                f"{list(shape)}: the checkpoint is damaged or its config was edited; quantize again."
            )
    zero = None
    if not scheme.symmetric:
        zero = unpack_zeros(tensors[f"{prefix}weight_zero_point"], scheme.bits, out_features)
    codes = unpack_rows(tensors[f"{prefix}weight_packed"], scheme.bits, in_features)
    return QuantizedWeight(codes, tensors[f"{prefix}weight_scale"], zero, scheme)


def unpack_zeros(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Zero points, int32 ``[ceil(out*bits/32), groups]`` to uint8 ``[out, groups]``."""
    # clone and not contiguous(): with one word a column the transpose counts as contiguous, with strides that do not.
    words = packed.T.clone(memory_format=torch.contiguous_format)
    return unpack_rows(words, bits, out_features).T.contiguous()


def _show(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"

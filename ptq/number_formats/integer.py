"""Integers of 2 to 8 bits in groups, with a scale per group and, where asymmetric, an integer zero point.

The tensors of a weight ``[out, in]`` in a checkpoint (compressed-tensors calls them ``pack-quantized``):

    X.weight_packed      int32  [out, ceil(in*bits/32)]      codes, packed along the input channels
    X.weight_scale       fp16 or bf16  [out, groups]
    X.weight_shape       int64  [2]                          out, in
    X.weight_zero_point  int32  [ceil(out*bits/32), groups]  asymmetric only; packed along the output channels

The value of a weight is ``(code - zero) * scale``; the zero of a symmetric weight is ``2^(bits-1)``. compressed-tensors
reads the same bits as signed numbers, ``code - 2^(bits-1)`` and ``zero - 2^(bits-1)``: the difference is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.grids import SCALE_DTYPES, ScaledGrid, ScaleSearch, Storage, fit_scales, uniform_grid
from ptq.number_formats.base import NumberFormat, TensorSpec
from ptq.packing.bits import pack_rows, packed_width, unpack_rows

__all__ = ["INTEGER", "IntegerFormat", "unpack_zeros"]


class IntegerFormat(NumberFormat):
    """``(code - zero) * scale``; parameters ``scale [out, groups]`` and, if asymmetric, ``zero`` uint8 likewise."""

    name = "int"
    summary = "integers of 2 to 8 bits; a scale per group or output channel, symmetric or with zero points"
    defaults: Mapping[str, object] = {}

    def check(self, scheme: Storage) -> None:
        """Any width that a scheme can have, symmetric or not, will do."""

    def describe(self, scheme: Storage) -> str:
        group = "per channel" if scheme.group_size is None else f"g{scheme.group_size}"
        return f"int{scheme.bits} {'sym' if scheme.symmetric else 'asym'} {group}"

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        scales = out_features * scheme.groups(in_features)
        per_group = 8 * SCALE_DTYPES[scheme.scale_dtype].itemsize + (0 if scheme.symmetric else scheme.bits)
        return out_features * in_features * scheme.bits + scales * per_group

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        groups = scheme.groups(in_features)
        specs: dict[str, TensorSpec] = {
            "weight_packed": ((out_features, packed_width(in_features, scheme.bits)), torch.int32),
            "weight_scale": ((out_features, groups), SCALE_DTYPES[scheme.scale_dtype]),
            "weight_shape": ((2,), torch.int64),
        }
        if not scheme.symmetric:
            specs["weight_zero_point"] = ((packed_width(out_features, scheme.bits), groups), torch.int32)
        return specs

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        scale, zero = fit_scales(target, scheme, search, importance)
        return {"scale": scale} if zero is None else {"scale": scale, "zero": zero}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = params["scale"].float()
        zero = params["zero"].float() if "zero" in params else torch.full_like(scale, 2 ** (scheme.bits - 1))
        grid = uniform_grid(scheme.bits, scale.device)
        return ScaledGrid(grid, scale, zero, scheme.group_index(in_features, scale.device), params)

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        if ("zero" in params) == scheme.symmetric:
            raise ValueError(f"{self.describe(scheme)} with{'' if 'zero' in params else 'out'} zero points")
        tensors = {
            "weight_packed": pack_rows(codes, scheme.bits),
            "weight_scale": params["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = pack_rows(params["zero"].T, scheme.bits).T.contiguous()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        params = {"scale": tensors["weight_scale"]}
        if not scheme.symmetric:
            params["zero"] = unpack_zeros(tensors["weight_zero_point"], scheme.bits, out_features)
        return unpack_rows(tensors["weight_packed"], scheme.bits, in_features), params

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        zero: Tensor | float = float(2 ** (scheme.bits - 1))
        if not scheme.symmetric:
            zero = unpack_zeros(tensors["weight_zero_point"], scheme.bits, out_features)[rows].float()
        weight = unpack_rows(tensors["weight_packed"][rows], scheme.bits, in_features).float()
        _dequantize_(weight, tensors["weight_scale"][rows].float(), zero, scheme.group_size)
        return weight


def unpack_zeros(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Zero points, int32 ``[ceil(out*bits/32), groups]`` to uint8 ``[out, groups]``."""
    # clone and not contiguous(): with one word a column the transpose counts as contiguous, with strides that do not.
    words = packed.T.clone(memory_format=torch.contiguous_format)
    return unpack_rows(words, bits, out_features).T.contiguous()


def _dequantize_(codes: Tensor, scale: Tensor, zero: Tensor | float, group_size: int | None) -> None:
    """``(code - zero) * scale`` in place, float32 ``[rows, in]``, scales ``[rows, groups]``, any ragged last group."""
    width = codes.shape[1]
    size = width if group_size is None else group_size
    full = width // size * size
    for start, stop, length in ((0, full, size), (full, width, width - full)):
        if stop > start:
            groups = slice(start // size, math.ceil(stop / size))
            part = codes[:, start:stop].view(len(codes), -1, length)  # [rows, groups, length]
            part.sub_(zero if isinstance(zero, float) else zero[:, groups, None]).mul_(scale[:, groups, None])


INTEGER = IntegerFormat()

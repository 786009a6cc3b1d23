"""Integers of 8 bits with a scale per output channel, a byte each: what runtimes multiply with integer inputs.

The tensors of a weight ``[out, in]`` in a checkpoint (compressed-tensors calls them ``int-quantized``):

    X.weight_packed  int8          [out, in]    compressed-tensors calls it X.weight
    X.weight_scale   fp16 or bf16  [out, 1]     value = number * scale

A code in memory counts upwards from 0, as those of `ptq.number_formats.integer` do: it is the number plus 128.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.grids import SCALE_DTYPES, Storage
from ptq.number_formats.base import TensorSpec, check_fields
from ptq.number_formats.integer import IntegerFormat

__all__ = ["INT8", "Int8Format"]

_ZERO = 128


class Int8Format(IntegerFormat):
    """``number * scale``; parameter ``scale [out, 1]``."""

    name = "int8"
    summary = "integers of 8 bits, a byte each, with a scale per output channel (W8A8)"
    defaults: Mapping[str, object] = {"bits": 8, "symmetric": True, "group_size": None}
    fixed_groups = True

    def check(self, scheme: Storage) -> None:
        fields = {"bits": 8, "group_size": None, "symmetric": True}
        check_fields(self.name, scheme, fields, "integers in groups (--format int)")

    def describe(self, scheme: Storage) -> str:
        return self.name

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        return {
            "weight_packed": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, 1), SCALE_DTYPES[scheme.scale_dtype]),
        }

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        numbers = (codes.to(torch.int16) - _ZERO).to(torch.int8)
        return {"weight_packed": numbers, "weight_scale": params["scale"]}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes = (tensors["weight_packed"].to(torch.int16) + _ZERO).to(torch.uint8)
        return codes, {"scale": tensors["weight_scale"]}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        return tensors["weight_packed"][rows].float().mul_(tensors["weight_scale"][rows].float())


INT8 = Int8Format()

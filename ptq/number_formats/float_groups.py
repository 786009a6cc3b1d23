"""Small floating-point numbers, E2M1, E3M0 or E1M2, with a half-precision scale per output channel or group.

The tensors of a weight ``[out, in]`` in a checkpoint:

    X.weight_packed  uint8         [out, ceil(in/2)]   two numbers per byte, the even input channel in the low nibble
    X.weight_scale   fp16 or bf16  [out, groups]
    X.weight_shape   int64         [2]                 out, in

A stored nibble is sign and magnitude (bit 3 is the sign), as the OCP Microscaling formats have it. In memory a code is
the index of its level in ascending order, 0 to 14: the nibble of -0 is read as 0 and never written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import UsageError, unknown_name
from ptq.grids import SCALE_DTYPES, ScaledGrid, ScaleSearch, Storage
from ptq.grids.floating_point import FloatFormat, float_format
from ptq.grids.table_search import fit_table_scales, grouped
from ptq.number_formats.base import NumberFormat, TensorSpec
from ptq.packing.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["E1M2", "E2M1", "E3M0", "FP4", "FloatGroupsFormat"]


class FloatGroupsFormat(NumberFormat):
    """``number * scale``; parameter ``scale [out, groups]``.

    Args:
        name: what users type.
        number: the 4-bit floating-point format.
        group_size: of the defaults; ``None`` is one scale per output channel.
        summary: one line for ``ptq methods``.
    """

    def __init__(self, name: str, number: FloatFormat, group_size: int | None, summary: str) -> None:
        self.name, self.number, self.summary = name, number, summary
        self.defaults: Mapping[str, object] = {
            "bits": number.bits,
            "symmetric": True,
            "group_size": group_size,
            "scale_dtype": "float16",
        }

    def check(self, scheme: Storage) -> None:
        if scheme.bits != self.number.bits:
            raise UsageError(
                f"the number format {self.name} has {self.number.bits} bits, got bits={scheme.bits!r}: leave it out."
            )
        if not scheme.symmetric:
            raise UsageError(f"the number format {self.name} has no zero points: leave out --asym (symmetric=False).")

    def describe(self, scheme: Storage) -> str:
        return f"{self.name} {'per channel' if scheme.group_size is None else f'g{scheme.group_size}'}"

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        scales = out_features * scheme.groups(in_features) * SCALE_DTYPES[scheme.scale_dtype].itemsize
        return self.number.bits * out_features * in_features + 8 * scales

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        return {
            "weight_packed": ((out_features, -(-in_features // 2)), torch.uint8),
            "weight_scale": ((out_features, scheme.groups(in_features)), SCALE_DTYPES[scheme.scale_dtype]),
            "weight_shape": ((2,), torch.int64),
        }

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if search not in self.searches:
            raise unknown_name(f"scale search of {self.name}", search, self.searches)
        dtype, grid = SCALE_DTYPES[scheme.scale_dtype], self.number.grid(target.device)
        return {"scale": fit_table_scales(target, grid, scheme.group_size, dtype, search, importance)}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = params["scale"].float()
        index = scheme.group_index(in_features, scale.device)
        return ScaledGrid(self.number.grid(scale.device), scale, torch.zeros_like(scale), index, params)

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_nibbles(self.number.patterns_of_codes(codes)),
            "weight_scale": params["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nibbles = unpack_nibbles(tensors["weight_packed"], in_features)
        return self.number.codes_of_patterns(nibbles), {"scale": tensors["weight_scale"]}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        values = self.number.values(unpack_nibbles(tensors["weight_packed"][rows], in_features))
        scale = tensors["weight_scale"][rows].float()
        return (grouped(values, scheme.group_size or in_features) * scale[..., None]).flatten(1)[:, :in_features]


FP4 = FloatGroupsFormat(
    "fp4", float_format("e2m1"), 32, "4-bit floating point (E2M1) in groups of 32 with half-precision scales"
)
E2M1 = FloatGroupsFormat("e2m1", float_format("e2m1"), None, "E2M1 with a half-precision scale per output channel")
E3M0 = FloatGroupsFormat("e3m0", float_format("e3m0"), None, "E3M0 (powers of two) with a scale per output channel")
E1M2 = FloatGroupsFormat("e1m2", float_format("e1m2"), None, "E1M2 (equal steps) with a scale per output channel")

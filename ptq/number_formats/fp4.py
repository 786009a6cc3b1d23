"""4-bit floating point, E2M1, with a half-precision scale per group: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

The tensors of a weight ``[out, in]`` in a checkpoint:

    X.weight_packed  uint8  [out, ceil(in/2)]      two codes per byte, the even input channel in the low nibble
    X.weight_scale   fp16 or bf16  [out, groups]
    X.weight_shape   int64  [2]                    out, in

A stored nibble is sign and magnitude (bit 3 is the sign), as the OCP Microscaling formats have it. In memory a code is
the index of its level in ascending order, 0 to 14: the nibble of -0 is read as 0 and never written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.grids import SCALE_DTYPES, Grid, ScaledGrid, ScaleSearch, Storage
from ptq.grids.table_search import fit_table_scales, grouped
from ptq.number_formats.base import NumberFormat, TensorSpec
from ptq.packing.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["E2M1_MAGNITUDES", "FP4", "Fp4Format"]

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NIBBLE_OF_CODE = torch.tensor([*range(15, 8, -1), *range(8)], dtype=torch.uint8)  # -6 .. -0.5, 0 .. 6
_CODE_OF_NIBBLE = torch.tensor([*range(7, 15), *range(7, -1, -1)], dtype=torch.uint8)  # nibble 8 is -0
_VALUE_OF_NIBBLE = torch.tensor([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)])


class Fp4Format(NumberFormat):
    """``level * scale`` with the 15 levels of E2M1; parameter ``scale [out, groups]``."""

    name = "fp4"
    summary = "4-bit floating point (E2M1) in groups of 32 with half-precision scales"
    defaults: Mapping[str, object] = {"bits": 4, "symmetric": True, "group_size": 32, "scale_dtype": "float16"}

    def check(self, scheme: Storage) -> None:
        if scheme.bits != 4:
            raise UsageError(f"the number format fp4 has 4 bits, got bits={scheme.bits!r}.")
        if not scheme.symmetric:
            raise UsageError("the number format fp4 has no zero points: leave out --asym (symmetric=False).")

    def describe(self, scheme: Storage) -> str:
        return f"fp4 {'per channel' if scheme.group_size is None else f'g{scheme.group_size}'}"

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        scales = out_features * scheme.groups(in_features) * SCALE_DTYPES[scheme.scale_dtype].itemsize
        return 4 * out_features * in_features + 8 * scales

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
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        scale = fit_table_scales(target, _levels(target.device), scheme.group_size, dtype, search, importance)
        return {"scale": scale}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = params["scale"].float()
        index = scheme.group_index(in_features, scale.device)
        return ScaledGrid(_levels(scale.device), scale, torch.zeros_like(scale), index, params)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        if codes.numel() and int(codes.max()) >= len(_NIBBLE_OF_CODE):
            raise ValueError(f"fp4 has codes 0 to 14, got {int(codes.max())}")
        nibbles = _NIBBLE_OF_CODE.to(codes.device)[codes.long()]
        return {
            "weight_packed": pack_nibbles(nibbles),
            "weight_scale": params["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nibbles = unpack_nibbles(tensors["weight_packed"], in_features)
        return _CODE_OF_NIBBLE.to(nibbles.device)[nibbles.long()], {"scale": tensors["weight_scale"]}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        nibbles = unpack_nibbles(tensors["weight_packed"][rows], in_features)
        values = _VALUE_OF_NIBBLE.to(nibbles.device)[nibbles.long()]
        scale = tensors["weight_scale"][rows].float()
        return (grouped(values, scheme.group_size or in_features) * scale[..., None]).flatten(1)[:, :in_features]


def _levels(device: torch.device) -> Grid:
    magnitudes = torch.tensor(E2M1_MAGNITUDES, device=device)
    return Grid(torch.cat([-magnitudes[1:].flip(0), magnitudes]))


FP4 = Fp4Format()

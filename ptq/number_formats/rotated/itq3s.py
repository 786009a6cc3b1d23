"""ITQ3_S, repaired: eight levels +-{1, 3, 5, 8} in blocks of 256 with a float16 scale and integer sub-block scales.

    value = scale * multiplier[sub-block] * level

    itq3s      multipliers 15, 12, 10, 8 per 32 weights: 100 bytes per block, 3.125 bits per weight
    itq3s-104  multipliers 15, 13, 12, 10, 9, 8, 7, 6 per 16 weights: 104 bytes, 3.25 bits

``multiplier * level`` fits in int8. The tensors of a weight ``[out, in]`` in a checkpoint:

    X.weight_packed  int32  [out, words]   blocks one after another, the last one short (`block_codes`)
    X.weight_shape   int64  [2]            out, in
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.grids import ScaledGrid, ScaleSearch, Storage
from ptq.grids.codebooks import ITQ3_MAGNITUDES
from ptq.grids.sub_block_scales import SubBlockLayout, fit_sub_block_scales
from ptq.number_formats.base import NumberFormat, TensorSpec
from ptq.number_formats.rotated.block_codes import multiplier_bits, pack_blocks, row_words, unpack_blocks
from ptq.number_formats.rotated.common import BLOCK, ROTATED, check_fixed, sub_block_grid

__all__ = ["ITQ3S", "ITQ3S_104", "Itq3sFormat"]

_STEP = 0.2545  # the best scale of +-{1, 3, 5, 8} for Gaussian weights of variance 1
_LEAST_WIDTH = 32


class Itq3sFormat(NumberFormat):
    """Parameters: ``scale`` float16 ``[out, blocks]``, ``multiplier`` uint8 ``[out, sub-blocks]`` (an index)."""

    defaults: Mapping[str, object] = {"bits": 3, **ROTATED}
    searches = ("pnorm", "hessian")

    def __init__(self, name: str, sub: int, multipliers: tuple[int, ...], size: str) -> None:
        self.name = name
        self.summary = f"rotated weights in 3-bit levels +-{{1, 3, 5, 8}}, {size} per weight with all scales"
        self.layout = SubBlockLayout(BLOCK, sub, multipliers, ITQ3_MAGNITUDES, _STEP)

    def check(self, scheme: Storage) -> None:
        check_fixed(self.name, scheme, (3,))

    def unsupported_reason(self, out_features: int, in_features: int, scheme: Storage) -> str | None:
        if in_features >= _LEAST_WIDTH:
            return None
        return f"it has {in_features} input channels, and blocks of this format need at least {_LEAST_WIDTH}"

    def describe(self, scheme: Storage) -> str:
        return self.name

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        layout = self.layout
        scales = 16 * layout.blocks(in_features) + multiplier_bits(layout) * layout.subs(in_features)
        return out_features * (3 * in_features + scales)

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        return {
            "weight_packed": ((out_features, row_words(self.layout, in_features)), torch.int32),
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
        """Least squares, weighted by ``importance`` for the search ``"hessian"``; any other search is the same."""
        scale, index = fit_sub_block_scales(target, self.layout, importance if search == "hessian" else None)
        return {"scale": scale, "multiplier": index}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        return sub_block_grid(params["scale"], params["multiplier"], self.layout, in_features, dict(params))

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_blocks(codes, params["scale"], params["multiplier"], self.layout),
            "weight_shape": torch.tensor(codes.shape),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes, scale, index = unpack_blocks(tensors["weight_packed"], self.layout, in_features)
        return codes, {"scale": scale, "multiplier": index}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        codes, params = self.unpack(
            {"weight_packed": tensors["weight_packed"][rows]}, scheme, out_features, in_features
        )
        return self.grid(params, scheme, in_features).dequantize(codes)


ITQ3S = Itq3sFormat("itq3s", 32, (15, 12, 10, 8), "3.125 bits")
ITQ3S_104 = Itq3sFormat("itq3s-104", 16, (15, 13, 12, 10, 9, 8, 7, 6), "3.25 bits")

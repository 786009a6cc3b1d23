"""8-bit floating point (E4M3) with a scale per output channel, per weight, or per 128 x 128 block.

The tensors of a weight ``[out, in]`` in a checkpoint:

    X.weight_packed  float8  [out, in]        E4M3; compressed-tensors calls it X.weight
    X.weight_scale   fp16 or bf16             [out, 1], [1], or [out / 128, in / 128] rounded up
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.errors import unknown_name
from ptq.grids import SCALE_DTYPES, ScaledGrid, ScaleSearch, Storage
from ptq.grids.block_scales import as_blocks, fit_ratio
from ptq.grids.floating_point import E4M3
from ptq.number_formats.base import NumberFormat, TensorSpec, check_fields, stored_bits

__all__ = ["FP8", "FP8_BLOCK", "FP8_TENSOR", "Fp8Format"]

_BLOCK = 128


class Fp8Format(NumberFormat):
    """``number * scale``; parameter ``scale [out, groups]`` in the scheme's dtype, equal in rows that share it.

    Args:
        name: what users type.
        rows: output channels that share a scale; ``None`` is all.
        columns: input channels that share a scale; ``None`` is all.
        summary: one line for ``ptq methods``.
    """

    searches = ("minmax", "mse", "pnorm", "hessian")
    fixed_groups = True

    def __init__(self, name: str, rows: int | None, columns: int | None, summary: str) -> None:
        self.name, self.summary = name, summary
        self._rows, self._columns = rows, columns
        self.defaults: Mapping[str, object] = {"bits": 8, "symmetric": True, "group_size": columns}

    def check(self, scheme: Storage) -> None:
        check_fields(self.name, scheme, {"bits": 8, "group_size": self._columns, "symmetric": True})

    def describe(self, scheme: Storage) -> str:
        return self.name

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        return stored_bits(self.tensor_specs(out_features, in_features, scheme))

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        scale: tuple[int, ...] = (1,)
        if self._rows is not None:
            scale = (-(-out_features // self._rows), 1 if self._columns is None else -(-in_features // self._columns))
        return {
            "weight_packed": ((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": (scale, SCALE_DTYPES[scheme.scale_dtype]),
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
        weights = None
        if search == "hessian" and importance is not None:
            height = len(target) if self._rows is None else self._rows
            weights = as_blocks(importance[None].float().expand(height, -1), height, self._columns)[0]
        blocks = as_blocks(target, self._rows, self._columns)
        scale = fit_ratio(blocks, E4M3, SCALE_DTYPES[scheme.scale_dtype], search, weights)
        return {"scale": self._per_row(scale, len(target))}

    def _per_row(self, scale: Tensor, out_features: int) -> Tensor:
        """Stored scales, a row per block of output channels, as ``[out, groups]``."""
        if self._rows is None:
            return scale.view(1, 1).expand(out_features, 1).contiguous()
        return scale if self._rows == 1 else scale.repeat_interleave(self._rows, 0)[:out_features]

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = params["scale"].float()
        index = scheme.group_index(in_features, scale.device)
        return ScaledGrid(E4M3.grid(scale.device), scale, torch.zeros_like(scale), index, params)

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features) if self._rows == 1 else None

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        scale = params["scale"]
        return {
            "weight_packed": E4M3.patterns_of_codes(codes).view(torch.float8_e4m3fn),
            "weight_scale": scale[0] if self._rows is None else scale[:: self._rows].contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes = E4M3.codes_of_patterns(tensors["weight_packed"].view(torch.uint8))
        return codes, {"scale": self._per_row(tensors["weight_scale"], out_features)}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        values = tensors["weight_packed"][rows].float()
        scale = self._per_row(tensors["weight_scale"], out_features)[rows].float()
        if self._columns is not None:
            scale = scale.repeat_interleave(self._columns, 1)[:, :in_features]
        return values.mul_(scale)


FP8 = Fp8Format("fp8", 1, None, "8-bit floating point (E4M3) with a scale per output channel")
FP8_TENSOR = Fp8Format("fp8-tensor", None, None, "8-bit floating point (E4M3) with one scale per weight")
FP8_BLOCK = Fp8Format("fp8-block", _BLOCK, _BLOCK, "8-bit floating point (E4M3) with a scale per 128 x 128 weights")

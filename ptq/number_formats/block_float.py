"""The 4- and 8-bit block formats that GPUs multiply: NVFP4, MXFP4 and MXFP8.

The tensors of a weight ``[out, in]`` in a checkpoint, as compressed-tensors has them:

    NVFP4   X.weight_packed        uint8     [out, in/2]    two E2M1 numbers per byte, the even channel low
            X.weight_scale         float8    [out, in/16]   E4M3
            X.weight_global_scale  float32   [1]            value = number * weight_scale / weight_global_scale
    MXFP4   X.weight_packed        uint8     [out, in/2]
            X.weight_scale         uint8     [out, in/32]   value = number * 2^(weight_scale - 127)
    MXFP8   X.weight_packed        float8    [out, in]      E4M3; compressed-tensors calls it X.weight
            X.weight_scale         uint8     [out, in/32]

A code in memory counts the levels of the number format upwards (`ptq.grids.floating_point`). Scales are fitted before
any solver rounds, and stay.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ptq.errors import unknown_name
from ptq.grids import ScaledGrid, ScaleSearch, Storage
from ptq.grids.block_scales import as_blocks, e8m0_values, exponent_scales, fit_e4m3, fit_e8m0, global_scale
from ptq.grids.floating_point import E2M1, E4M3, FloatFormat
from ptq.number_formats.base import NumberFormat, TensorSpec, check_fields, ragged_reason, stored_bits
from ptq.packing.nibbles import pack_nibbles, unpack_nibbles

__all__ = ["MXFP4", "MXFP8", "NVFP4", "MxFormat", "Nvfp4Format"]


class _BlockFormat(NumberFormat):
    """What all share: numbers of one floating-point format, blocks of a fixed size, no zero points."""

    number: FloatFormat
    block: int

    def check(self, scheme: Storage) -> None:
        fields = {"bits": self.number.bits, "group_size": self.block, "symmetric": True}
        check_fields(self.name, scheme, fields, "a format with free groups (e.g. fp4)")

    def unsupported_reason(self, out_features: int, in_features: int, scheme: Storage) -> str | None:
        return ragged_reason(self.name, self.block, in_features)

    def describe(self, scheme: Storage) -> str:
        return self.name

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        return stored_bits(self.tensor_specs(out_features, in_features, scheme))

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        packed: TensorSpec = ((out_features, in_features), torch.float8_e4m3fn)
        if self.number.bits == 4:
            packed = ((out_features, in_features // 2), torch.uint8)
        scale = ((out_features, in_features // self.block), self._scale_dtype)
        return {"weight_packed": packed, "weight_scale": scale}

    fixed_groups = True
    _scale_dtype = torch.uint8

    def blocks(self, target: Tensor, search: str, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``target`` in blocks ``[out, groups, block]`` and the importance ``[groups, block]``."""
        if search not in self.searches:
            raise unknown_name(f"scale search of {self.name}", search, self.searches)
        if importance is not None:
            importance = as_blocks(importance[None].float(), 1, self.block)[0]
        return as_blocks(target, 1, self.block), importance

    @abc.abstractmethod
    def scale(self, params: Mapping[str, Tensor]) -> Tensor:
        """Scales of stored parameters, float32 ``[out, groups]``."""

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = self.scale(params)
        index = scheme.group_index(in_features, scale.device)
        return ScaledGrid(self.number.grid(scale.device), scale, torch.zeros_like(scale), index, params)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        patterns = self.number.patterns_of_codes(codes)
        packed = pack_nibbles(patterns) if self.number.bits == 4 else patterns.view(torch.float8_e4m3fn)
        return {"weight_packed": packed, **{f"weight_{name}": value for name, value in params.items()}}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        names = self.tensor_specs(out_features, in_features, scheme).keys() - {"weight_packed"}
        params = {name.removeprefix("weight_"): tensors[name] for name in sorted(names)}
        return self.number.codes_of_patterns(self._patterns(tensors["weight_packed"], in_features)), params

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        values = self.number.values(self._patterns(tensors["weight_packed"][rows], in_features))
        params = {name: value[rows] if value.ndim == 2 else value for name, value in self._params(tensors).items()}
        return values.view(len(values), -1, self.block).mul_(self.scale(params)[..., None]).flatten(1)

    def _params(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scale": tensors["weight_scale"]}

    def _patterns(self, packed: Tensor, in_features: int) -> Tensor:
        return unpack_nibbles(packed, in_features) if self.number.bits == 4 else packed.view(torch.uint8)


class Nvfp4Format(_BlockFormat):
    """E2M1 in blocks of 16; parameters ``scale`` float8 E4M3 ``[out, groups]`` and ``global_scale`` float32 ``[1]``."""

    name, number, block = "nvfp4", E2M1, 16
    summary = "E2M1 in blocks of 16 with E4M3 scales under a tensor scale (4.5 bits per weight)"
    defaults: Mapping[str, object] = {"bits": 4, "symmetric": True, "group_size": 16}
    searches = ("minmax", "four_over_six", "mse", "pnorm", "hessian")
    _scale_dtype = torch.float8_e4m3fn

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        specs = super().tensor_specs(out_features, in_features, scheme)
        return specs | {"weight_global_scale": ((1,), torch.float32)}

    def share(self, targets: Iterable[Tensor], scheme: Storage) -> Mapping[str, Tensor]:
        """``largest``: the largest magnitude of all weights of the group, of which the tensor scale is made."""
        largest = [target.abs().amax() for target in targets]
        return {"largest": torch.stack(largest).amax()} if largest else {}

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        blocks, weights = self.blocks(target, search, importance)
        # A corrected target may reach beyond the group's weights: its block scales then saturate, as the format has it.
        largest = target.abs().amax() if not shared else shared["largest"].to(target.device)
        tensor_scale = global_scale(largest, search)
        return {"scale": fit_e4m3(blocks, tensor_scale, search, weights), "global_scale": tensor_scale}

    def scale(self, params: Mapping[str, Tensor]) -> Tensor:
        return params["scale"].float() / params["global_scale"]

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features)

    def _params(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scale": tensors["weight_scale"], "global_scale": tensors["weight_global_scale"]}


class MxFormat(_BlockFormat):
    """Blocks of 32 with an exponent each; parameter ``scale`` uint8 ``[out, groups]``."""

    block = 32
    searches = ("minmax", "floor", "even", "rceil", "mse", "pnorm", "hessian")

    def __init__(self, name: str, number: FloatFormat) -> None:
        self.name, self.number = name, number
        self.summary = (
            f"{number.name.upper()} in blocks of 32 with exponents of 8 bits ({number.bits + 0.25} bits per weight)"
        )
        self.defaults: Mapping[str, object] = {"bits": number.bits, "symmetric": True, "group_size": self.block}

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        blocks, weights = self.blocks(target, search, importance)
        return {"scale": fit_e8m0(blocks, self.number, search, weights)}

    def scale(self, params: Mapping[str, Tensor]) -> Tensor:
        return exponent_scales(params["scale"])

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        e8m0_values(tensors["weight_scale"])  # refuses what is not a number
        return super().unpack(tensors, scheme, out_features, in_features)


NVFP4 = Nvfp4Format()
MXFP4 = MxFormat("mxfp4", E2M1)
MXFP8 = MxFormat("mxfp8", E4M3)

"""Codebooks with one float16 scale per 256 weights: the Gaussian-optimal one (scalar HIGGS), and ITQ3_S's ternary one.

    higgs          2, 3 or 4 bits per code: 2.0625, 3.0625, 4.0625 bits per weight (arXiv 2411.17525, p = 1)
    itq3s-ternary  -1, 0, 1 in codes of 3 bits and a float16 zero, as in the paper of ITQ3_S (arXiv 2603.27914): 3.125
                   bits per weight; for comparison

The tensors of a weight ``[out, in]`` in a checkpoint:

    X.weight_packed      int32  [out, ceil(in*bits/32)]   codes, packed along the input channels
    X.weight_scale       fp16   [out, ceil(in/256)]
    X.weight_zero_point  fp16   [out, ceil(in/256)]       ternary only, in units of levels
    X.weight_shape       int64  [2]                       out, in
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.grids import ScaledGrid, ScaleSearch, Storage, check_finite
from ptq.grids.codebooks import GAUSSIAN, TERNARY_MAGNITUDES
from ptq.grids.sub_block_scales import SubBlockLayout, check_half, fit_sub_block_scales
from ptq.number_formats.base import NumberFormat, TensorSpec
from ptq.number_formats.rotated.common import BLOCK, ROTATED, check_fixed, sub_block_grid
from ptq.packing.bits import pack_rows, packed_width, unpack_rows

__all__ = ["HIGGS", "ITQ3S_TERNARY", "GaussianFormat", "TernaryFormat"]

_PUBLISHED_STEP = 0.798  # of the paper, in standard deviations; 1.224 has the least squared error
_LAYOUTS = {bits: SubBlockLayout(BLOCK, BLOCK, (1,), magnitudes, 1.0) for bits, magnitudes in GAUSSIAN.items()}
_TERNARY = SubBlockLayout(BLOCK, BLOCK, (1,), TERNARY_MAGNITUDES, 1.224)


class GaussianFormat(NumberFormat):
    """Parameter: ``scale`` float16 ``[out, blocks]``."""

    name = "higgs"
    summary = "rotated weights in the Gaussian-optimal levels of 2, 3 or 4 bits, one float16 scale per 256"
    defaults: Mapping[str, object] = {"bits": 4, **ROTATED}
    searches: tuple[str, ...] = ("pnorm", "hessian")

    def check(self, scheme: Storage) -> None:
        check_fixed(self.name, scheme, tuple(GAUSSIAN))

    def describe(self, scheme: Storage) -> str:
        return f"higgs{scheme.bits}"

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        return out_features * (scheme.bits * in_features + 16 * scheme.groups(in_features))

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        return {
            "weight_packed": ((out_features, packed_width(in_features, scheme.bits)), torch.int32),
            "weight_scale": ((out_features, scheme.groups(in_features)), torch.float16),
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
        scale, _ = fit_sub_block_scales(target, _LAYOUTS[scheme.bits], importance if search == "hessian" else None)
        return {"scale": scale}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale = params["scale"]
        return sub_block_grid(
            scale, torch.zeros_like(scale, dtype=torch.uint8), _LAYOUTS[scheme.bits], in_features, dict(params)
        )

    def scale_groups(self, scheme: Storage, in_features: int) -> Tensor | None:
        return scheme.group_index(in_features)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_rows(codes, scheme.bits),
            "weight_scale": params["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes = unpack_rows(tensors["weight_packed"], scheme.bits, in_features)
        return codes, {"scale": tensors["weight_scale"]}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        part = {key: tensor[rows] for key, tensor in tensors.items() if key != "weight_shape"}
        codes, params = self.unpack(part, scheme, out_features, in_features)
        return self.grid(params, scheme, in_features).dequantize(codes)


class TernaryFormat(GaussianFormat):
    """Parameters: ``scale`` and ``zero`` float16 ``[out, blocks]``.

    The search ``minmax`` takes the published step and zero; the others take the step with the least squared error.
    """

    name = "itq3s-ternary"
    summary = "rotated weights in -1, 0, 1 as the paper of ITQ3_S has them, 3.125 bits per weight; for comparison"
    defaults: Mapping[str, object] = {"bits": 3, **ROTATED}
    searches = ("minmax", "pnorm", "hessian")

    def check(self, scheme: Storage) -> None:
        check_fixed(self.name, scheme, (3,))

    def describe(self, scheme: Storage) -> str:
        return self.name

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        return out_features * (3 * in_features + 32 * scheme.groups(in_features))

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        specs = super().tensor_specs(out_features, in_features, scheme)
        return specs | {"weight_zero_point": specs["weight_scale"]}

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """See the class."""
        if search == "minmax":
            return _published(target)
        scale, _ = fit_sub_block_scales(target, _TERNARY, importance if search == "hessian" else None)
        return {"scale": scale, "zero": torch.zeros_like(scale)}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        scale, zero = params["scale"], params["zero"].float()
        grid = sub_block_grid(scale, torch.zeros_like(scale, dtype=torch.uint8), _TERNARY, in_features, dict(params))
        return ScaledGrid(grid.grid, grid.scale, zero, grid.group, grid.params)

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        return super().pack(codes, params, scheme) | {"weight_zero_point": params["zero"]}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes, params = super().unpack(tensors, scheme, out_features, in_features)
        return codes, params | {"zero": tensors["weight_zero_point"]}


def _published(target: Tensor) -> dict[str, Tensor]:
    """Step and zero of the paper's ternary code: 0.798 standard deviations, and minus the mean in whole steps."""
    check_finite(target)
    scales, zeros = [], []
    for part in torch.split(target, BLOCK, 1):
        step = _PUBLISHED_STEP * part.std(1, correction=0)
        check_half(step)
        scale = step.to(torch.float16)
        zero = -(part.mean(1) / scale.float().clamp(min=2.0**-24)).round_()
        scales.append(scale)
        zeros.append(zero.to(torch.float16))
    return {"scale": torch.stack(scales, 1), "zero": torch.stack(zeros, 1)}


HIGGS = GaussianFormat()
ITQ3S_TERNARY = TernaryFormat()

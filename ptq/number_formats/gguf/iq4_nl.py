"""IQ4_NL: sixteen unequal levels, a float16 scale per 32 weights; for widths that k-quants refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptq.grids import ScaledGrid, Storage
from ptq.grids.grid import Grid
from ptq.number_formats.gguf.base import GgufFormat, nonzero
from ptq.number_formats.gguf.fit import fit_table
from ptq.number_formats.gguf.layout import from_planes, pack_halves, to_planes, unpack_halves

__all__ = ["IQ4_NL", "IQ4_NL_LEVELS"]

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _Iq4Nl(GgufFormat):
    """Parameter: ``scale`` float16 ``[out, blocks]``, of either sign."""

    block, sub, symmetric, bits, block_bytes = 32, 32, True, 4, 18
    fallback_fields: Mapping[str, Any] = {}

    def fit_blocks(self, weights: Tensor, h: Tensor) -> dict[str, Tensor]:
        return {"scale": fit_table(weights[:, 0], h[:, 0], _levels(weights.device))}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        step = nonzero(params["scale"].float())
        grid = Grid(_levels(step.device))
        return ScaledGrid(grid, step, torch.zeros_like(step), self.group(in_features, step.device), params)

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((pack_halves(params["scale"]), to_planes(codes, 4, 32)), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        d, codes = torch.split(packed, [2, 16], 1)
        return from_planes(codes, 4, 32), {"scale": unpack_halves(d)}


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=device)


IQ4_NL = _Iq4Nl("iq4_nl", "llama.cpp's IQ4_NL: 16 unequal levels in groups of 32, 4.5 bits per weight")

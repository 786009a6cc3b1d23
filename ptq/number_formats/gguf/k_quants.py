"""k-quants as grids: every solver rounds onto scales that the type can store, 6-bit steps times float16.

q3_k, q6_k         value = scale * multiplier * (code - 2^(bits-1)), multipliers with a sign, per 16 weights
q2_k, q4_k, q5_k   value = scale * multiplier * code - minimum * other multiplier, per 16 (q2_k) or 32 weights
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptq.grids import ScaledGrid, Storage, uniform_grid
from ptq.number_formats.gguf.base import GgufFormat, nonzero
from ptq.number_formats.gguf.fit import fit_minima, fit_signed
from ptq.number_formats.gguf.layout import (
    from_planes,
    pack_halves,
    pack_k4_scales,
    pack_q3_scales,
    to_planes,
    unpack_halves,
    unpack_k4_scales,
    unpack_q3_scales,
)

__all__ = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

_PLAIN = {"format": "int", "symmetric": True, "group_size": 32, "scale_dtype": "float16"}


class _Signed(GgufFormat):
    """Parameters: ``scale`` float16 ``[out, blocks]``, ``multiplier`` int8 ``[out, blocks * 16]``."""

    block, sub, symmetric = 256, 16, True
    lowest: int

    def fit_blocks(self, weights: Tensor, h: Tensor) -> dict[str, Tensor]:
        scale, multiplier = fit_signed(weights, h, self.bits, self.lowest)
        return {"scale": scale, "multiplier": multiplier}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        step = nonzero(self.per_step(params["scale"]) * params["multiplier"].float())
        zero = torch.full_like(step, 2 ** (self.bits - 1))
        grid = uniform_grid(self.bits, step.device)
        return ScaledGrid(grid, step, zero, self.group(in_features, step.device), params)


class _Minima(GgufFormat):
    """Parameters: ``scale`` and ``minimum`` float16 ``[out, blocks]``, ``multiplier`` and ``minimum_multiplier`` uint8
    ``[out, blocks * subs]``."""

    block, symmetric = 256, False
    top: int

    def fit_blocks(self, weights: Tensor, h: Tensor) -> dict[str, Tensor]:
        scale, minimum, m, k = fit_minima(weights, h, self.bits, self.top)
        return {"scale": scale, "minimum": minimum, "multiplier": m, "minimum_multiplier": k}

    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        step = nonzero(self.per_step(params["scale"]) * params["multiplier"].float())
        offset = self.per_step(params["minimum"]) * params["minimum_multiplier"].float()
        grid = uniform_grid(self.bits, step.device)
        return ScaledGrid(grid, step, offset / step, self.group(in_features, step.device), params)


class _Q2K(_Minima):
    bits, sub, top, block_bytes = 2, 16, 15, 84
    fallback_fields: Mapping[str, Any] = {"format": "iq4_nl"}

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        scales = params["multiplier"] | (params["minimum_multiplier"] << 4)
        ends = pack_halves(params["scale"]), pack_halves(params["minimum"])
        return torch.cat((scales, to_planes(codes, 2, 128), *ends), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scales, codes, d, dmin = torch.split(packed, [16, 64, 2, 2], 1)
        params = {"scale": unpack_halves(d), "minimum": unpack_halves(dmin)}
        params |= {"multiplier": scales & 15, "minimum_multiplier": scales >> 4}
        return from_planes(codes, 2, 128), params


class _Q3K(_Signed):
    bits, lowest, block_bytes = 3, -32, 110
    fallback_fields: Mapping[str, Any] = {"format": "iq4_nl"}

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        scales = pack_q3_scales((params["multiplier"].to(torch.int16) + 32).to(torch.uint8))
        high, low = to_planes(codes >> 2, 1, 256), to_planes(codes & 3, 2, 128)
        return torch.cat((high, low, scales, pack_halves(params["scale"])), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        high, low, scales, d = torch.split(packed, [32, 64, 12, 2], 1)
        multiplier = (unpack_q3_scales(scales).to(torch.int16) - 32).to(torch.int8)
        codes = from_planes(low, 2, 128) | (from_planes(high, 1, 256) << 2)
        return codes, {"scale": unpack_halves(d), "multiplier": multiplier}


class _Q4K(_Minima):
    bits, sub, top, block_bytes = 4, 32, 63, 144
    fallback_fields: Mapping[str, Any] = {**_PLAIN, "bits": 5}

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((*_head(params), to_planes(codes, 4, 64)), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        d, dmin, scales, codes = torch.split(packed, [2, 2, 12, 128], 1)
        return from_planes(codes, 4, 64), _params(d, dmin, scales)


class _Q5K(_Minima):
    bits, sub, top, block_bytes = 5, 32, 63, 176
    fallback_fields: Mapping[str, Any] = {**_PLAIN, "bits": 5}

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((*_head(params), to_planes(codes >> 4, 1, 256), to_planes(codes & 15, 4, 64)), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        d, dmin, scales, high, low = torch.split(packed, [2, 2, 12, 32, 128], 1)
        return from_planes(low, 4, 64) | (from_planes(high, 1, 256) << 4), _params(d, dmin, scales)


class _Q6K(_Signed):
    bits, lowest, block_bytes = 6, -128, 210
    fallback_fields: Mapping[str, Any] = {**_PLAIN, "bits": 8}

    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        low, high = to_planes(codes & 15, 4, 128), to_planes(codes >> 4, 2, 128)
        return torch.cat((low, high, params["multiplier"].view(torch.uint8), pack_halves(params["scale"])), 1)

    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        low, high, scales, d = torch.split(packed, [128, 64, 16, 2], 1)
        codes = from_planes(low, 4, 128) | (from_planes(high, 2, 128) << 4)
        return codes, {"scale": unpack_halves(d), "multiplier": scales.contiguous().view(torch.int8)}


def _head(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    scales = pack_k4_scales(params["multiplier"], params["minimum_multiplier"])
    return pack_halves(params["scale"]), pack_halves(params["minimum"]), scales


def _params(d: Tensor, dmin: Tensor, scales: Tensor) -> dict[str, Tensor]:
    m, k = unpack_k4_scales(scales)
    return {"scale": unpack_halves(d), "minimum": unpack_halves(dmin), "multiplier": m, "minimum_multiplier": k}


Q2_K = _Q2K("q2_k", "llama.cpp's Q2_K: 2 bits with minima, 2.625 bits per weight with all scales")
Q3_K = _Q3K("q3_k", "llama.cpp's Q3_K: 3 bits, 6-bit scales per 16, 3.4375 bits per weight with all scales")
Q4_K = _Q4K("q4_k", "llama.cpp's Q4_K: 4 bits with minima, 6-bit scales per 32, 4.5 bits per weight with all scales")
Q5_K = _Q5K("q5_k", "llama.cpp's Q5_K: 5 bits with minima, 5.5 bits per weight with all scales")
Q6_K = _Q6K("q6_k", "llama.cpp's Q6_K: 6 bits, 8-bit scales per 16, 6.5625 bits per weight with all scales")

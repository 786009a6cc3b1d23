"""What the number formats of GGUF share: blocks of a fixed size, stored as the bytes that a GGUF file has."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ptq.errors import unknown_name
from ptq.grids import SMALLEST_STEP, ScaledGrid, ScaleSearch, Storage, check_finite
from ptq.number_formats.base import NumberFormat, TensorSpec, check_fields, ragged_reason, stored_bits

__all__ = ["GgufFormat", "nonzero"]

_CHUNK = 1 << 20  # weights fitted at once


class GgufFormat(NumberFormat):
    """One block type: ``X.weight_packed`` uint8 ``[out, blocks * block_bytes]`` and ``X.weight_shape`` int64 ``[2]``.

    Subclasses fit, pack and unpack blocks, rows one after another.
    """

    block: int
    """Weights of a row in one block."""
    sub: int
    """Weights that share a step."""
    block_bytes: int
    bits: int
    symmetric: bool
    fallback_fields: Mapping[str, Any]

    def __init__(self, name: str, summary: str) -> None:
        self.name, self.summary = name, summary
        self.defaults = {
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.block,
            "scale_dtype": "float16",
        }

    @property
    def fallback(self) -> Mapping[str, Any]:
        """Fields of the scheme that a weight of another width gets."""
        return self.fallback_fields

    def check(self, scheme: Storage) -> None:
        check_fields(self.name, scheme, self.defaults, "integers (--format int)")

    def unsupported_reason(self, out_features: int, in_features: int, scheme: Storage) -> str | None:
        return ragged_reason(self.name, self.block, in_features)

    def describe(self, scheme: Storage) -> str:
        return self.name

    def payload_bits(self, out_features: int, in_features: int, scheme: Storage) -> int:
        specs = self.tensor_specs(out_features, in_features, scheme)
        return stored_bits({"weight_packed": specs["weight_packed"]})

    def tensor_specs(self, out_features: int, in_features: int, scheme: Storage) -> dict[str, TensorSpec]:
        size = in_features // self.block * self.block_bytes
        return {"weight_packed": ((out_features, size), torch.uint8), "weight_shape": ((2,), torch.int64)}

    def fit(
        self,
        target: Tensor,
        scheme: Storage,
        search: ScaleSearch = "pnorm",
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Least squares, weighted by ``importance`` for the search ``"hessian"``; the other searches are the same."""
        if search not in self.searches:
            raise unknown_name(f"scale search of {self.name}", search, self.searches)
        check_finite(target)
        weighted = importance if search == "hessian" else None
        h = torch.ones(target.shape[1], device=target.device) if weighted is None else weighted.float().clamp(min=0)
        # Where no input ever is, every scale is as good: the weights themselves decide.
        h = h + 1e-6 * h.mean().clamp(min=1e-30)
        parts = [self._fit_rows(rows, h) for rows in self._chunks(target)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chunks(self, target: Tensor) -> Iterator[Tensor]:
        return iter(torch.split(target, max(1, _CHUNK // target.shape[1])))

    def _fit_rows(self, target: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Parameters of some rows, each ``[rows, n]``."""
        rows = len(target)
        weights = target.reshape(-1, self.block // self.sub, self.sub)  # [rows * blocks, subs, sub]
        tiled = h.view(1, -1, self.block // self.sub, self.sub).expand(rows, -1, -1, -1).reshape(weights.shape)
        return {name: value.reshape(rows, -1) for name, value in self.fit_blocks(weights, tiled).items()}

    @abc.abstractmethod
    def fit_blocks(self, weights: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Parameters of blocks ``[n, subs, sub]``, each ``[n]`` or ``[n, subs]``."""

    @abc.abstractmethod
    def pack_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Blocks of codes uint8 ``[n, block]`` as bytes ``[n, block_bytes]``."""

    @abc.abstractmethod
    def unpack_blocks(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `pack_blocks`."""

    @abc.abstractmethod
    def grid(self, params: Mapping[str, Tensor], scheme: Storage, in_features: int) -> ScaledGrid:
        """See `NumberFormat.grid`."""

    def pack(self, codes: Tensor, params: Mapping[str, Tensor], scheme: Storage) -> dict[str, Tensor]:
        if codes.numel() and int(codes.max()) >= 2**self.bits:
            raise ValueError(f"a code of {int(codes.max())} does not fit in {self.bits} bits")
        blocks = codes.numel() // self.block
        split = {name: value.reshape(blocks, -1) for name, value in params.items()}
        packed = self.pack_blocks(codes.reshape(blocks, self.block), split)
        return {"weight_packed": packed.reshape(len(codes), -1), "weight_shape": torch.tensor(codes.shape)}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Storage, out_features: int, in_features: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        packed = tensors["weight_packed"]
        codes, params = self.unpack_blocks(packed.reshape(-1, self.block_bytes))
        rows = len(packed)
        return codes.reshape(rows, -1), {name: value.reshape(rows, -1) for name, value in params.items()}

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], scheme: Storage, rows: slice, out_features: int, in_features: int
    ) -> Tensor:
        codes, params = self.unpack(
            {"weight_packed": tensors["weight_packed"][rows]}, scheme, out_features, in_features
        )
        return self.grid(params, scheme, in_features).dequantize(codes)

    def group(self, in_features: int, device: torch.device) -> Tensor:
        """The step of every input channel."""
        return torch.arange(in_features, device=device) // self.sub

    def per_step(self, values: Tensor) -> Tensor:
        """Numbers per block ``[out, blocks]`` for every step, float32 ``[out, blocks * subs]``."""
        return values.float().repeat_interleave(self.block // self.sub, 1)


def nonzero(step: Tensor) -> Tensor:
    """Steps by which a grid can be divided: those of zero stand for the smallest one."""
    return torch.where(step == 0, SMALLEST_STEP, step)

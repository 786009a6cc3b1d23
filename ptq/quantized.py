"""`QuantizedWeight`: what every method returns, every format stores and the runtime computes with."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ptq.grids import BoundGrid, Grid, uniform_grid
from ptq.scheme import SCALE_DTYPES, Scheme

__all__ = ["QuantizedWeight"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One linear's weight ``[out, in]`` as codes and scales.

    Args:
        codes: uint8 ``[out, in]``, one code a byte (packing belongs to the formats).
        scale: ``[out, groups]`` in the scheme's ``scale_dtype``; exactly the values that will be stored.
        zero: uint8 ``[out, groups]`` zero points in units of codes; ``None`` where the scheme is symmetric (the zero is
            then ``2^(bits-1)``).
        scheme: what was asked for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def grid(self) -> Grid:
        return uniform_grid(self.scheme.bits, self.codes.device)

    def bound_grid(self) -> BoundGrid:
        """The grid with this weight's scales, in float32."""
        scale = self.scale.float()
        zero = torch.full_like(scale, 2 ** (self.scheme.bits - 1)) if self.zero is None else self.zero.float()
        return BoundGrid(self.grid, scale, zero, self.scheme.group_index(self.shape[1], self.codes.device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]`` that the runtime multiplies with: computed in float32, then cast to ``dtype``."""
        return self.bound_grid().dequantize(self.codes).to(dtype)

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, scales and zero points without padding to words: the real size of this weight."""
        _out, _width = self.shape
        bits = self.codes.numel() * self.scheme.bits
        bits += self.scale.numel() * 8 * SCALE_DTYPES[self.scheme.scale_dtype].itemsize
        bits += 0 if self.zero is None else self.zero.numel() * self.scheme.bits
        return (bits + 7) // 8

    @property
    def bits_per_weight(self) -> float:
        """Real bits a weight: codes, scales and zero points together."""
        return 8 * self.payload_bytes / self.codes.numel()

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero)

"""What static quantizers of activations need of a linear's inputs: the range of every channel, and a sample of tokens.

Both depend only on which tokens were seen, not on the order of batches or which process had them: ranges are minima and
maxima, and the sample has the tokens with the smallest pseudo-random keys, where a token's key is a hash of its place
in the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SAMPLED_TOKENS", "AllGather", "ChannelRanges", "TokenSample"]

AllGather = Callable[[Tensor], list[Tensor]]
"""From a tensor of this process to those of all processes, which have the same shape."""
SAMPLED_TOKENS = 2048
"""Tokens in a sample; one of more than 4000 changes no choice of a scale that could be measured."""
_LAST = 2**63 - 1  # the key of a place in the sample that is still free
# Multipliers of SplitMix64 (Steele, Lea and Flood 2014) as signed numbers, and a stride between sequences.
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_SEQUENCE_STRIDE = 1 << 32


class ChannelRanges:
    """The smallest and the largest input of every channel.

    Args:
        width: number of channels.
        device: of the inputs.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._bounds = torch.full((2, width), -torch.inf, device=device)  # -min, max

    def add(self, inputs: Tensor) -> None:
        """Add a batch ``[..., n]``."""
        if not inputs.numel():
            return
        low, high = torch.aminmax(inputs.reshape(-1, inputs.shape[-1]), dim=0)
        torch.maximum(self._bounds, torch.stack([-low, high]), out=self._bounds)

    def reduce_(self, all_gather: AllGather) -> None:
        """Those of all processes."""
        self._bounds = torch.stack(all_gather(self._bounds)).amax(0)

    def finish(self) -> Tensor:
        """Minimum and maximum of every channel, float32 ``[2, n]``; zeros if there was no token."""
        bounds = self._bounds.nan_to_num(neginf=0.0)
        return torch.stack([-bounds[0], bounds[1]])


class TokenSample:
    """A uniform sample of tokens without replacement.

    Args:
        width: number of channels.
        device: of the inputs.
        dtype: of the inputs.
        limit: number of tokens that are kept.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype, limit: int = SAMPLED_TOKENS) -> None:
        self._keys = torch.full((limit,), _LAST, device=device)
        self._rows = torch.zeros(limit, width, device=device, dtype=dtype)

    def add(self, inputs: Tensor, first: int) -> None:
        """Add a batch ``[sequences, tokens, n]`` whose first sequence has the number ``first``."""
        sequences, tokens, width = inputs.shape
        sequence = torch.arange(first, first + sequences, device=inputs.device)[:, None] * _SEQUENCE_STRIDE
        keys = _mixed((sequence + torch.arange(tokens, device=inputs.device)).reshape(-1))
        few = torch.topk(keys, min(len(keys), len(self._keys)), largest=False).indices
        self._keep(keys[few], inputs.reshape(-1, width)[few])

    def _keep(self, keys: Tensor, rows: Tensor) -> None:
        keys = torch.cat([self._keys, keys])
        chosen = torch.topk(keys, len(self._keys), largest=False, sorted=True).indices
        self._keys, self._rows = keys[chosen], torch.cat([self._rows, rows.to(self._rows.dtype)])[chosen]

    def reduce_(self, all_gather: AllGather) -> None:
        """That of the tokens of all processes."""
        keys, rows = torch.cat(all_gather(self._keys)), torch.cat(all_gather(self._rows))
        chosen = torch.topk(keys, len(self._keys), largest=False, sorted=True).indices
        self._keys, self._rows = keys[chosen], rows[chosen]

    def finish(self) -> Tensor:
        """The sampled inputs ``[t, n]`` in the order of their keys, fewer than the limit if there were fewer."""
        return self._rows[self._keys != _LAST]


def _mixed(place: Tensor) -> Tensor:
    """Pseudo-random numbers from 0 to 2^63 - 2; equal for two places by a rare chance only."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        place = (place + 1) ^ ((place + 1) >> shift)
        place = place * factor  # wraps around, on every device alike
    return (place ^ (place >> 31)).bitwise_and_(_LAST).clamp_(max=_LAST - 1)

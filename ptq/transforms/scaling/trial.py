"""The trial of a scaling: a pass with random scales, beside the pass without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptq.transforms.scaling.uses import Scaling, scaled_values
from ptq.transforms.tracing import with_values

__all__ = ["STRICT", "TOLERANCE", "Trial"]

TOLERANCE = 1e-4
"""Largest relative change of a token's output in float32 that passes for none."""
STRICT = 5e-6
"""The same where a small change is a small rotation."""
_SHARE = 1e-2  # of what half of a scaling changes, at most this may be left of it all
_VISIBLE = 1e-5  # what half of a scaling must change at least


class Trial:
    """Passes through one block.

    Args:
        block: with its weights in float32; run: one pass through it; seed: of the scales.
    """

    def __init__(self, block: nn.Module, run: Callable[[], Tensor], seed: int = 0) -> None:
        self.block, self.run, self.seed = block, run, seed
        with torch.no_grad():
            self.output = run()

    def passes(self, scaling: Scaling, *, signed: bool = False) -> bool:
        """Whether a scaling stands the trial; ``signed``: with random signs, too."""
        return self.unsupported_reason(scaling, signed=signed) is None

    def unsupported_reason(self, scaling: Scaling, *, signed: bool = False) -> str | None:
        """What is against a scaling, in words; ``None`` if nothing is."""
        scale = self._scale(scaling.size, signed)
        half = self._change(scaling, scale, only=1)
        if half < _VISIBLE:
            return f"its effect on the block's output is too small to be judged ({half:.1g} of it)"
        change = self._change(scaling, scale)
        limit = min(TOLERANCE, _SHARE * half)
        if not change <= limit:
            return f"the block's output changes by {change:.1g} of its size (limit {limit:.1g})"
        return None

    def passes_strictly(self, scaling: Scaling) -> bool:
        """Whether a scaling stands a trial with scales between 1/16 and 16 within `STRICT`."""
        return self._change(scaling, self._scale(scaling.size, False, 4.0)) <= STRICT and self.passes(scaling)

    def _scale(self, size: int, signed: bool, octaves: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scale = torch.exp2(octaves * (2.0 * torch.rand(size, generator=generator) - 1.0))
        signs = 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=generator)
        return (scale * signs if signed else scale).to(self.output.device)

    def _change(self, scaling: Scaling, scale: Tensor, only: int | None = None) -> float:
        """Root mean square over tokens of the relative change; ``only``: with the uses of one power."""
        uses = tuple(use for use in scaling.uses if only is None or use.power == only)
        with torch.no_grad(), with_values(self.block, dict(scaled_values(self.block, uses, scale))):
            found = self.run()
        width = self.output.shape[-1]
        wanted = self.output.reshape(-1, width).double()
        difference = found.reshape(-1, width).double() - wanted
        rows = difference.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
        return float(rows.square().mean().sqrt())

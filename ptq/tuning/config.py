"""`TuneConfig`: how norms are tuned."""

from __future__ import annotations

import dataclasses
import math

from ptq.errors import UsageError

__all__ = ["TuneConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Options of `ptq.tuning.tune`.

    Args:
        epochs: Passes over the sequences that are learned from.
        lr: Learning rate of AdamW, which falls to 0 by a cosine; gains of norms are about 1.
        batch: Sequences in a step; they pass through the model one by one.
        held_out: Share of the sequences whose loss decides what is kept; at least two of them.
        checks: How often that loss is taken.
        seed: Of the order of sequences.

    Raises:
        UsageError: A value out of its range.
    """

    epochs: int = 2
    lr: float = 1e-3
    batch: int = 4
    held_out: float = 0.125
    checks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "checks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} must be a whole number, at least 1; got {value!r}.")
        if not isinstance(self.lr, int | float) or not math.isfinite(self.lr) or self.lr <= 0:
            raise UsageError(f"lr must be a number above 0, got {self.lr!r}.")
        if not isinstance(self.held_out, int | float) or not 0 < self.held_out < 1:
            raise UsageError(f"held_out must be a share between 0 and 1, got {self.held_out!r}.")
        if type(self.seed) is not int:
            raise UsageError(f"seed must be a whole number, got {self.seed!r}.")

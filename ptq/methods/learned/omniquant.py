"""OmniQuant (arXiv 2308.13137): learned clipping, block after block; channel scales where activations are quantized."""

from __future__ import annotations

import dataclasses
from typing import Literal

from calib.runner.window_schedule import ScheduleName
from ptq.learning.config import Intra, LearnedConfig
from ptq.methods.base import WindowMethod

__all__ = ["OMNIQUANT", "OmniquantConfig"]


@dataclasses.dataclass(frozen=True)
class OmniquantConfig(LearnedConfig):
    """Args: those of `LearnedConfig`, with one block at a time, no curriculum, no low-rank addition, constant rates."""

    schedule: ScheduleName = "single"
    intra: Intra = "off"
    lora_rank: int = 0
    batch: int = 1
    decay: Literal["linear", "constant"] = "constant"
    lr_clip: float = 1e-2
    lr_scale: float = 5e-3


OMNIQUANT = WindowMethod("omniquant", "learned clipping (and channel scales), block after block", OmniquantConfig)

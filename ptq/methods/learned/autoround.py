"""AutoRound (SignRound, arXiv 2309.05516): every weight's rounding moved by at most half a level, by signed gradients.

Offsets and the two ends of every group's range are learned together, block after block; learning rates start at
``1 / iters`` and fall to zero, so an offset cannot go further than half a level.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from calib.runner.window_schedule import ScheduleName
from ptq.learning.config import Clip, Intra, Keep, LearnedConfig, Loss, Rounding
from ptq.methods.base import WindowMethod

__all__ = ["AUTOROUND", "AutoroundConfig"]


@dataclasses.dataclass(frozen=True)
class AutoroundConfig(LearnedConfig):
    """Args: those of `LearnedConfig`, with learned offsets and bounded ranges, 200 signed steps a block.

    The loss is relative to each token's energy. The paper has the plain squared error; where the first token of a
    sequence carries nearly all of it, the best step by that is the one that fits these tokens of the calibration data
    best, and what the block does to other first tokens is lost.
    """

    schedule: ScheduleName = "single"
    intra: Intra = "off"
    iters: int = 200
    batch: int = 8
    lora_rank: int = 0
    clip: Clip = "bounded"
    rounding: Rounding = "offset"
    optimizer: Literal["adamw", "sign"] = "sign"
    grad_clip: float = 0.0
    keep: Keep = "best"
    loss: Loss = "token"


AUTOROUND = WindowMethod(
    "autoround", "learned offsets to rounding, by signed gradients, block after block", AutoroundConfig
)

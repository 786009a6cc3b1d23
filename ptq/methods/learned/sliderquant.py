"""SliderQuant (arXiv 2603.25284): learning over windows that expand over the first blocks, slide over the middle and
contract over the last.

`SLIDERQUANT_LORA` is the method as published: a low-rank addition and learned clipping, with AdamW, and a curriculum
that quantizes half of the input channels first. `SLIDERQUANT` keeps the windows and learns in them what AutoRound
learns in single blocks: an offset to every weight's rounding, by signed gradients. On the models we measured this is
far better at the same cost (docs/methods/sliderquant.md), so it has the short name. Both scale channels where
activations are quantized.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ptq.learning.config import Clip, Intra, LearnedConfig, Loss, Rounding
from ptq.methods.base import WindowMethod

__all__ = ["SLIDERQUANT", "SLIDERQUANT_LORA", "SliderquantConfig", "SliderquantLoraConfig"]


@dataclasses.dataclass(frozen=True)
class SliderquantConfig(LearnedConfig):
    """Args: those of `LearnedConfig`, with learned offsets and bounded ranges, 100 signed steps a window (every block
    is in two or more)."""

    iters: int = 100
    intra: Intra = "off"
    lora_rank: int = 0
    clip: Clip = "bounded"
    rounding: Rounding = "offset"
    optimizer: Literal["adamw", "sign"] = "sign"
    grad_clip: float = 0.0
    loss: Loss = "token"


@dataclasses.dataclass(frozen=True)
class SliderquantLoraConfig(LearnedConfig):
    """The defaults of `LearnedConfig` are those of the published method."""


SLIDERQUANT = WindowMethod(
    "sliderquant", "learned offsets to rounding, over sliding windows of blocks", SliderquantConfig
)
SLIDERQUANT_LORA = WindowMethod(
    "sliderquant-lora", "SliderQuant as published: low-rank addition and clipping", SliderquantLoraConfig
)

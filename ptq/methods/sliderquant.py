"""SliderQuant (arXiv 2603.25284): a low-rank addition, learned clipping and, with quantized activations, channel
scales, trained over windows that expand over the first blocks, slide over the middle and contract over the last.

First only half of the input channels is quantized, in a sweep over the whole model, then all of them. The defaults are
those of the released code where it differs from the paper (docs/methods/sliderquant.md names each difference).
"""

from __future__ import annotations

import dataclasses

from ptq.learning import LearnedConfig
from ptq.methods.base import WindowMethod

__all__ = ["SLIDERQUANT", "SliderquantConfig"]


@dataclasses.dataclass(frozen=True)
class SliderquantConfig(LearnedConfig):
    """The defaults of `LearnedConfig` are SliderQuant's."""


SLIDERQUANT = WindowMethod(
    "sliderquant", "low-rank addition and clipping, learned over sliding windows of blocks", SliderquantConfig
)

"""Learning a quantization: straight-through rounding of weights, trained window by window against the full model.

`config` says what is learned and how as data; `rounding` is the rounding with its gradient; `linear` and `block` hold
what is learned; `training` is the loop. A method is a set of defaults of one `LearnedConfig` (`ptq.methods`).
"""

from ptq.learning.config import LearnedConfig

__all__ = ["LearnedConfig"]

"""ZD, z-score distribution: a block with fewer weights above one standard deviation is more important. No data.

    ZD(block) = share of the block's weights with (w - mean) / std > 1        (all its linears pooled)

The importance here is ``-ZD``, so that larger means more important, as everywhere. A Gaussian has .1587; heavier tails
have less, and count as more important.

Source: Layer-Wise Quantization (arXiv 2406.17415), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calib.model.structure import find_blocks, find_linears, linear_weight
from ptq.allocation.scores.base import Context, Score, ScoreValues

__all__ = ["ZD", "share_above_one"]


def share_above_one(weights: Sequence[Tensor]) -> float:
    """The share of all entries of some tensors that lie more than one standard deviation above their common mean."""
    count = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.double().sum()) for weight in weights) / count
    variance = sum(float((weight.double() - mean).square().sum()) for weight in weights) / count
    limit = mean + variance**0.5
    return sum(int((weight.double() > limit).sum()) for weight in weights) / count


def _compute(context: Context) -> ScoreValues:
    source, scores = context.source, {}
    blocks = find_blocks(source.skeleton)
    context.steps.begin("blocks: reading weights", len(blocks))
    for name in blocks:
        inside = frozenset(tensor for tensor in source.tensor_names() if tensor.startswith(f"{name}."))
        source.load(inside)
        modules = find_linears(source.skeleton.get_submodule(name)).values()
        with torch.no_grad():
            scores[name] = -share_above_one([linear_weight(module) for module in modules])
        source.release(inside)
        context.steps(name)
    return ScoreValues(blocks=scores)


ZD = Score(
    "zd",
    "share of a block's weights above one standard deviation",
    "one pass over the weights",
    "order",
    False,
    _compute,
)

"""LIM, layer input modification: a block that turns the hidden state further is more important.

    LIM(block) = -mean over tokens of cos(h_in, h_out)

Per token, in float32. The first position of every sequence is left out: it holds the attention sink, whose norm is
larger than all others and whose direction hardly moves.

Source: Layer-Wise Quantization (arXiv 2406.17415), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.gradients import GradientPasses
from ptq.allocation.scores.base import Context, Score, ScoreValues
from ptq.errors import UsageError

__all__ = ["LIM", "turned"]


def turned(before: Tensor, after: Tensor) -> Tensor:
    """``-cos`` of every token but the first of each sequence, float32 ``[sequences, tokens - 1]``."""
    return -torch.nn.functional.cosine_similarity(before[..., 1:, :].float(), after[..., 1:, :].float(), dim=-1)


def _compute(context: Context) -> ScoreValues:
    assert context.tokens is not None
    if context.tokens.shape[1] < 2:
        raise UsageError("lim leaves the first position out, so sequences need at least 2 tokens (--calib-seqlen).")
    passes = GradientPasses(
        context.source,
        context.tokens,
        device=context.device,
        dtype=context.dtype,
        new_store=context.new_store,
        on_block=context.steps,
    )
    sums = [0.0] * len(passes.block_names)
    count = context.tokens.numel() - len(context.tokens)

    def observe(index: int, _: int, before: Tensor, after: Tensor) -> None:
        sums[index] += float(turned(before, after).double().sum()) / count

    try:
        context.steps.begin("blocks: forward pass", len(passes.block_names))
        passes.forward(observe)
    finally:
        passes.close()
    return ScoreValues(blocks=dict(zip(passes.block_names, sums, strict=True)))


LIM = Score("lim", "how far a block turns the hidden state", "one forward pass", "order", True, _compute)

"""Two baselines for comparisons: every linear alike, and blocks in random order."""

from __future__ import annotations

import torch

from calib.model.structure import find_blocks
from ptq.allocation.scores.base import Context, Score, ScoreValues

__all__ = ["RANDOM", "UNIFORM"]


def _random(context: Context) -> ScoreValues:
    names = find_blocks(context.source.skeleton)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(context.seed))
    return ScoreValues(blocks={name: float(rank) for name, rank in zip(names, order, strict=True)})


def _uniform(context: Context) -> ScoreValues:
    return ScoreValues()


RANDOM = Score("random", "blocks in random order (--seed), a baseline", "nothing", "order", False, _random)
UNIFORM = Score("uniform", "one format for all, the largest that fits, a baseline", "nothing", "order", False, _uniform)

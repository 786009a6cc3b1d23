"""What is planned for: the model, its linears, the formats, the score and the tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from calib.checkpoint.reader import ModelSource
from calib.data.tokens import Calibration
from ptq.allocation.problem.candidates import Candidate
from ptq.allocation.problem.items import Linear
from ptq.allocation.scores import Score

__all__ = ["Setting"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned for.

    Args:
        source: the model.
        linears: those that a format is chosen for.
        candidates: the formats, with the dtype of their scales settled.
        kept_bytes: stored bytes of everything else.
        score: how sensitivity is measured.
        calibration: the tokens of scores; ``None`` where none are read.
        held_out: tokens for measuring, which no score reads.
        device: where to work.
        dtype: of passes.
        seed: of what is drawn.
        probes: Hutchinson probes and power iterations.
        outside: names of the embedding and the head among the linears, where they are candidates.
    """

    source: ModelSource
    linears: tuple[Linear, ...]
    candidates: tuple[Candidate, ...]
    kept_bytes: int
    score: Score
    calibration: Calibration | None
    held_out: Tensor | None
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    probes: int = 16
    outside: tuple[str, ...] = ()

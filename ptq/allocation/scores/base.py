"""What a sensitivity score is: a row of the table, computed from one context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from calib.checkpoint.reader import ModelSource
from calib.gradients import NewStore
from ptq.allocation.problem.candidates import Candidate
from ptq.allocation.progress import Steps

__all__ = ["Context", "Score", "ScoreValues"]


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything that a score may use.

    Args:
        source: the model.
        linears: full names of the linears that are to be scored.
        candidates: the formats, the columns of the table.
        tokens: int64 ``[sequences, seqlen]``; ``None`` for scores that read no data.
        device: where to work.
        dtype: of passes through the model.
        seed: of labels, probes and orders that are drawn.
        errors: weight float32 ``[out, in]`` -> what every candidate would add to it, one after another, float32.
        new_store: makes stores of hidden states.
        steps: told what is being done, and after every step of it.
        probes: Hutchinson probes and power iterations.
    """

    source: ModelSource
    linears: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    tokens: Tensor | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    errors: Callable[[Tensor], Iterable[Tensor]]
    new_store: NewStore
    steps: Steps = dataclasses.field(default_factory=Steps)
    probes: int = 16


@dataclasses.dataclass(frozen=True)
class ScoreValues:
    """What a score gives.

    Args:
        table: by full name of a linear, one value for every candidate: the predicted increase of the loss.
        blocks: by name of a block its importance, for scores that only rank blocks.
        notes: sentences that a reader must know.
        details: other figures by linear, e.g. traces.
    """

    table: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of the table of scores.

    Args:
        name: what users type.
        summary: one line for help and docs.
        cost: what it takes, in passes over the tokens.
        unit: ``nats`` where values are predicted KL in nats per token, ``order`` where blocks are only ranked,
            ``relative`` otherwise.
        reads_tokens: whether it needs calibration tokens.
        compute: the function.
    """

    name: str
    summary: str
    cost: str
    unit: Literal["nats", "relative", "order"]
    reads_tokens: bool
    compute: Callable[[Context], ScoreValues]

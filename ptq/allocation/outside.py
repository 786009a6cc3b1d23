"""The embedding and the head as candidates: what they can be stored as, and what that costs, measured.

Scores of linears are made of what enters and leaves them in a block. What lies outside the blocks is measured instead:
the KL of the model with that one alone in each format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calib.gradients import NewStore
from ptq.allocation.measure import measure_kl
from ptq.allocation.problem.candidates import Candidate
from ptq.allocation.problem.items import Item
from ptq.allocation.progress import Steps
from ptq.allocation.setting import Setting
from ptq.errors import UsageError
from ptq.pipeline.preparation.schemes.outside import outside_problem

__all__ = ["allow_outside", "outside_scores"]

_TOKENS = 2048  # of those of the scores


def allow_outside(setting: Setting, items: Sequence[Item], allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which candidates every item may have, without those that the embedding and the head cannot be stored as.

    Args:
        setting: names the embedding and the head.
        items: the rows.
        allowed: what limits allow, bool ``[items, candidates]``.

    Raises:
        UsageError: nothing is left for one of them.
    """
    result = allowed.copy()
    for row, item in enumerate(items):
        if item.linears[0].name not in setting.outside:
            continue
        result[row] &= [_carries(setting, item.name, candidate) for candidate in setting.candidates]
        if not result[row].any():
            labels = ", ".join(candidate.label for candidate in setting.candidates)
            raise UsageError(
                f"{item.name} can have none of the candidates {labels} that limits allow: the embedding and the head "
                f"take integers and floating point, the embedding symmetric ones (4sym), or bf16 for none."
            )
    return result


def outside_scores(setting: Setting, new_store: NewStore, steps: Steps) -> dict[str, list[float]]:
    """Measured KL per token of every candidate, by name of the embedding and the head.

    Formats that one cannot have get the worst of the others: they are not allowed for it.

    Args:
        setting: model, candidates, tokens, of which some are read.
        new_store: makes stores of hidden states.
        steps: told of every name and candidate.
    """
    if not setting.outside or setting.calibration is None:
        return {}
    tokens = setting.calibration.tokens
    some = tokens[: max(1, _TOKENS // tokens.shape[1])]

    def cost(name: str, candidate: Candidate) -> float:
        if candidate.scheme is None:
            return 0.0
        if not _carries(setting, name, candidate):
            return math.nan
        kl = measure_kl(
            setting.source,
            some,
            {name: candidate},
            device=setting.device,
            dtype=setting.dtype,
            new_store=new_store,
        )
        return max(0.0, float(kl.mean()))

    def stepped(name: str, candidate: Candidate) -> float:
        value = cost(name, candidate)
        steps(f"{name} as {candidate.label}")
        return value

    steps.begin(
        "candidates: KL with the embedding or head alone in each", len(setting.outside) * len(setting.candidates)
    )
    found = {}
    for name in setting.outside:
        row = np.array([stepped(name, candidate) for candidate in setting.candidates])
        found[name] = [float(value) for value in np.where(np.isnan(row), np.nanmax(row), row)]
    return found


def _carries(setting: Setting, name: str, candidate: Candidate) -> bool:
    """Whether the embedding or the head can be stored so."""
    module = setting.source.skeleton.get_submodule(name)
    return candidate.scheme is None or outside_problem(module, candidate.scheme) is None

"""The table of sensitivity scores. Adding one: a file here, and its row below."""

from __future__ import annotations

from types import MappingProxyType

from ptq.allocation.scores.base import Context, Score, ScoreValues
from ptq.allocation.scores.baselines import RANDOM, UNIFORM
from ptq.allocation.scores.fisher import FISHER, HAWQ, MODELOPT, OUT_FISHER
from ptq.allocation.scores.hessian import HAWQ_EIG, HAWQ_HVP
from ptq.allocation.scores.kl import KL
from ptq.allocation.scores.lim import LIM
from ptq.allocation.scores.zd import ZD
from ptq.errors import unknown_name

__all__ = ["SCORES", "Context", "Score", "ScoreValues", "find_score"]

_ROWS = (FISHER, OUT_FISHER, MODELOPT, HAWQ, HAWQ_HVP, HAWQ_EIG, KL, LIM, ZD, UNIFORM, RANDOM)
SCORES = MappingProxyType({score.name: score for score in _ROWS})


def find_score(name: str) -> Score:
    """The score of that name.

    Raises:
        UsageError: there is none; near names are offered.
    """
    if name not in SCORES:
        raise unknown_name("score", name, SCORES)
    return SCORES[name]

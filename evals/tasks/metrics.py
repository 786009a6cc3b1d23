"""Scores of a task from the log-likelihoods of its answers, item by item.

``acc`` takes the answer of the highest log-likelihood, ``acc_norm`` divides it by the answer's characters before, and
``acc_bytes`` by its UTF-8 bytes; ties go to the first answer, as in lm-evaluation-harness. ``ll_gold`` (nats) and
``p_gold``, the right answer's share of the answers' probability, are continuous: a change far too small to flip an
answer still moves them, so they settle differences with fewer items.
"""

from __future__ import annotations

import numpy as np

from evals.items import Column, Items

__all__ = ["HIGHER_IS_BETTER", "METRICS", "answers", "per_item"]

METRICS = ("acc", "acc_norm", "acc_bytes", "p_gold", "ll_gold")
HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "acc_bytes": True, "p_gold": True, "ll_gold": True}
_LENGTHS = {"acc": None, "acc_norm": "characters", "acc_bytes": "bytes"}


def answers(items: Items, metric: str) -> Column:
    """Which answer the model gives to each item, int64 ``[n]``, by ``acc``, ``acc_norm`` or ``acc_bytes``.

    An item with one continuation (LAMBADA) is answered by 0 if that is what the model would write, else by 1.
    """
    if "greedy" in items.columns:
        given: Column = 1 - items["greedy"].astype(np.int64)
        return given
    length = _LENGTHS[metric]
    scores = items["ll"].astype(np.float64)
    if length is not None:
        scores = scores / np.maximum(items[length], 1)
    return np.array([int(np.argmax(part)) for part in _parts(items, scores)], dtype=np.int64)


def per_item(items: Items, metric: str) -> Column:
    """One number per item, float64 ``[n]``: 0 or 1 for the accuracies, nats for ``ll_gold``, a share for ``p_gold``."""
    if metric in _LENGTHS:
        right: Column = (answers(items, metric) == items["gold"]).astype(np.float64)
        return right
    parts = _parts(items, items["ll"].astype(np.float64))
    gold = items["gold"].tolist()
    if metric == "ll_gold":
        return np.array([part[g] for part, g in zip(parts, gold, strict=True)])
    if metric == "p_gold":
        if "greedy" in items.columns:  # no other answers: the probability of the continuation itself
            return np.array([np.exp(part[0]) for part in parts])
        return np.array([_share(part, g) for part, g in zip(parts, gold, strict=True)])
    raise KeyError(metric)


def _parts(items: Items, values: Column) -> list[Column]:
    return np.split(values, np.cumsum(items["counts"], dtype=np.int64)[:-1])


def _share(scores: Column, gold: int) -> float:
    weights = np.exp(scores - scores.max())
    return float(weights[gold] / weights.sum())

"""The result of a task: log-likelihoods of every answer, and the metrics that follow from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from evals.items import Items, plain_fields
from evals.statistics import mean_and_error, safe_exp
from evals.tasks.metrics import METRICS, per_item

__all__ = ["TaskResult"]


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """A zero-shot or few-shot task by log-likelihood.

    Args:
        name: of the task.
        source: file or data set of its rows.
        settings: ``fewshot``, ``prompt`` and whatever else decides what is asked.
        metric: the one that is customary for it.
        chance: its value by guessing; ``None`` where guessing has none.
        items: a row each: ``gold``, ``counts`` (answers), ``ll`` (nats), ``characters`` and ``bytes`` of each answer;
            ``greedy`` (0 or 1) where the continuation is the only answer; ``cluster`` where rows come in groups.
        notes: what a reader must know.
        seconds: of scoring.
    """

    name: str
    source: str
    settings: dict[str, Any]
    metric: str
    chance: float | None
    items: Items
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Name -> ``value`` and ``standard_error``, which counts rows of one cluster as one draw."""
        single = "greedy" in self.items.columns
        names = [name for name in METRICS if not (single and name in ("acc_norm", "acc_bytes"))]
        found = {name: mean_and_error(per_item(self.items, name), clusters=self.clusters) for name in names}
        table = {name: {"value": mean, "standard_error": error} for name, (mean, error) in found.items()}
        if single:  # LAMBADA's perplexity: of the last word, tokens not counted
            mean, error = found["ll_gold"]
            value = safe_exp(-mean)
            spread = None if error is None or value is None else value * error
            table["perplexity"] = {"value": value, "standard_error": None if spread == math.inf else spread}
        return table

    @property
    def clusters(self) -> np.ndarray[Any, Any] | None:
        """Group of each row, int32 ``[n]``, where rows are not independent draws."""
        return self.items.columns.get("cluster")

    def to_dict(self) -> dict[str, Any]:
        """JSON data: the fields and the figures that follow from them."""
        return plain_fields(self) | {"rows": len(self.items), "metrics": self.metrics}

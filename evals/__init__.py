"""Metrics of a model on data: perplexity, divergence, tasks, and paired comparison. Knows no method and no format."""

from evals.comparison.compare import compare
from evals.comparison.types import Comparison
from evals.evaluate import evaluate
from evals.record import Record, read_record
from evals.tasks.registry import known_tasks
from evals.texts.sources import load_text

__all__ = [
    "Comparison",
    "Record",
    "compare",
    "evaluate",
    "known_tasks",
    "load_text",
    "read_record",
]

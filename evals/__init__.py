"""Metrics of a model on data: perplexity, divergence, tasks, and paired comparison. Knows no method and no format."""

from evals.compare import compare
from evals.comparison import Comparison
from evals.data import load_text
from evals.evaluate import evaluate
from evals.record import Record, read_record
from evals.tasks import known_tasks

__all__ = [
    "Comparison",
    "Record",
    "compare",
    "evaluate",
    "known_tasks",
    "load_text",
    "read_record",
]

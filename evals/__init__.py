"""Metrics of a model on data: perplexity, divergence, tasks, and paired comparison. Knows no method and no format."""

from evals.compare import compare
from evals.comparison import Comparison
from evals.data import load_text
from evals.divergence import DivergenceResult, divergence
from evals.evaluate import evaluate
from evals.perplexity import PerplexityResult, perplexity
from evals.record import Record, read_record
from evals.tasks import known_tasks

__all__ = [
    "Comparison",
    "DivergenceResult",
    "PerplexityResult",
    "Record",
    "compare",
    "divergence",
    "evaluate",
    "known_tasks",
    "load_text",
    "perplexity",
    "read_record",
]

"""Metrics of a model on data: perplexity, bits per byte, divergence. Knows no method and no format."""

from evals.data import load_text
from evals.divergence import DivergenceResult, divergence
from evals.perplexity import PerplexityResult, perplexity

__all__ = ["DivergenceResult", "PerplexityResult", "divergence", "load_text", "perplexity"]

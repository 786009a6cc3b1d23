"""Tests of `evals.texts`."""

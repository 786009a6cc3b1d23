"""Tests of `evals.comparison`."""

"""Tests of `evals.inference`."""

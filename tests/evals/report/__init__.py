"""Tests of `evals.report`."""

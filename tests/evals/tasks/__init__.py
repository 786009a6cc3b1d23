"""Tests of `evals.tasks`."""

"""Tests of `ptq.solvers`."""

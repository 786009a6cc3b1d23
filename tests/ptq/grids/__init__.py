"""Tests of `ptq.grids`."""

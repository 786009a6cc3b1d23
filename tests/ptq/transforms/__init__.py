"""Tests of `ptq.transforms`."""

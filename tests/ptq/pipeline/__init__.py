"""Tests of `ptq.pipeline`."""

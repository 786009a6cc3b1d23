"""Tests of `ptq.pipeline.preparation`."""

"""Tests of `ptq.learning`."""

"""Tests of `ptq.runtime`."""

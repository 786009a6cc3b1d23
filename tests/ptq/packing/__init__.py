"""Tests of `ptq.packing`."""

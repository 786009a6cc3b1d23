"""Tests of `ptq.methods`."""

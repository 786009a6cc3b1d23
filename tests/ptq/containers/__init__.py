"""Tests of `ptq.containers`."""

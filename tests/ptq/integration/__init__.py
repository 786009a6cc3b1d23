"""Tests of `ptq.integration`."""

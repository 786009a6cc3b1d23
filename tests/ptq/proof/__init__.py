"""Tests of `ptq.proof`."""

"""Tests of `ptq`."""

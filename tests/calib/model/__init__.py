"""Tests of `calib.model`."""

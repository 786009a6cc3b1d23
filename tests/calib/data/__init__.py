"""Tests of `calib.data`."""

"""Tests of `calib`."""

"""Tests of `calib.checkpoint`."""

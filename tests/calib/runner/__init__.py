"""Tests of `calib.runner`."""

"""Tests of `ptq.checkpoint`."""

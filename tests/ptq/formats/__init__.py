"""Tests of `ptq.formats`."""

"""Tests of `cli.shared`."""

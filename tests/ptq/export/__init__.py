"""Tests of ptq.export."""

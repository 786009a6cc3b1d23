"""Tests of the command `ptq quantize`."""

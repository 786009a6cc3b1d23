"""Offline tests on the CPU, in the same rooms as the code."""

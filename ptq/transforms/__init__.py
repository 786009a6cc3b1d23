"""Exact changes of a model before it is quantized: rotations (`hadamard`, `residual`), channel scalings
(`scaling`)."""

"""Checkpoint containers: native and compressed-tensors, and which of them can carry a result."""

"""Codes, scales and zero points of one linear, to tensors and back."""

"""Checkpoints that are quantized already, read as if they were in full precision.

`open_weights` shows a folder's tensors under the names and shapes of the dense model. A weight that is stored as codes,
scales and zero points (FP8, compressed-tensors, GPTQ, AWQ) is dequantized when it is read and not before, so that
memory holds the block that is worked on, as with any other model: computed in float32 and rounded once to the model's
dtype.
"""

from __future__ import annotations

from calib.checkpoint.quantized.methods import read_dense, source_method
from calib.checkpoint.quantized.packed import PackedWeight, SourceQuantization
from calib.checkpoint.quantized.weights import StoredWeights, open_weights, packed_weights

__all__ = [
    "PackedWeight",
    "SourceQuantization",
    "StoredWeights",
    "open_weights",
    "packed_weights",
    "read_dense",
    "source_method",
]

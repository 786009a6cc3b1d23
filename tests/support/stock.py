"""transformers as it is without ptq, in a process that has imported it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

__all__ = ["stock_transformers"]

_NAME = "compressed-tensors"


@contextmanager
def stock_transformers() -> Iterator[None]:
    """Folders of compressed-tensors are read by transformers' own classes."""
    ours = AUTO_QUANTIZATION_CONFIG_MAPPING[_NAME], AUTO_QUANTIZER_MAPPING[_NAME]
    AUTO_QUANTIZATION_CONFIG_MAPPING[_NAME] = CompressedTensorsConfig
    AUTO_QUANTIZER_MAPPING[_NAME] = CompressedTensorsHfQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[_NAME], AUTO_QUANTIZER_MAPPING[_NAME] = ours

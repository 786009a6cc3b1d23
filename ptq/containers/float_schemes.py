"""Floating-point formats and rounded inputs in compressed-tensors: what its own presets say of each pair.

compressed-tensors describes weights and inputs by fields, which the library's presets fill for every format that its
readers know. A pair of ours is carried where a preset has both halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from ptq.scheme import Scheme

__all__ = ["PAIRS", "Pair", "find_pair", "preset_scheme", "renamed", "stored_names"]

Pair = tuple[str, str | None]
"""A number format and an activation format."""

PAIRS: Mapping[Pair, tuple[str, str]] = MappingProxyType(
    {
        ("nvfp4", None): ("NVFP4A16", "nvfp4-pack-quantized"),
        ("nvfp4", "nvfp4"): ("NVFP4", "nvfp4-pack-quantized"),
        ("mxfp4", None): ("MXFP4A16", "mxfp4-pack-quantized"),
        ("mxfp4", "mxfp4"): ("MXFP4", "mxfp4-pack-quantized"),
        ("mxfp8", None): ("MXFP8A16", "mxfp8-quantized"),
        ("mxfp8", "mxfp8"): ("MXFP8", "mxfp8-quantized"),
        ("fp8", "fp8"): ("FP8_DYNAMIC", "float-quantized"),
        ("fp8-tensor", "fp8-tensor"): ("FP8", "float-quantized"),
        ("fp8-block", "fp8-block"): ("FP8_BLOCK", "float-quantized"),
        ("int8", "int8"): ("W8A8", "int-quantized"),
    }
)
"""The library's preset and the name of its storage, by pair."""
_AS_WEIGHT = ("mxfp8", "fp8", "fp8-tensor", "fp8-block", "int8")  # 8-bit numbers are stored as X.weight


def find_pair(scheme: Scheme) -> Pair | None:
    """The pair of a scheme, if the library has it."""
    pair = (scheme.format, scheme.act_format)
    return pair if pair in PAIRS and scheme.act_bits is None else None


def preset_scheme(pair: Pair, targets: list[str]) -> QuantizationScheme:
    """What ``config.json`` says of the linears ``targets``."""
    preset, storage = PAIRS[pair]
    scheme = preset_name_to_scheme(preset, targets)
    scheme.format = storage
    return scheme


def stored_names(format: str) -> Mapping[str, str]:
    """Our names of a weight's tensors that compressed-tensors has another name for."""
    return {"weight_packed": "weight"} if format in _AS_WEIGHT else {}


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by full name with their last parts as ``names`` says."""
    found = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        found[f"{module}.{names.get(leaf, leaf)}" if module else names.get(leaf, leaf)] = value
    return found

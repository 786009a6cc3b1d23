"""Presets: the names under which users of compressed-tensors know pairs of weight and input formats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ptq.errors import unknown_name

__all__ = ["PRESETS", "find_preset"]


def _integers(bits: int, **more: Any) -> dict[str, Any]:
    return {"format": "int", "bits": bits, "symmetric": True, "group_size": 128, "act_format": None, **more}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "NVFP4": {"format": "nvfp4", "act_format": "nvfp4"},
        "NVFP4A16": {"format": "nvfp4", "act_format": None},
        "MXFP4": {"format": "mxfp4", "act_format": "mxfp4"},
        "MXFP4A16": {"format": "mxfp4", "act_format": None},
        "MXFP8": {"format": "mxfp8", "act_format": "mxfp8"},
        "MXFP8A16": {"format": "mxfp8", "act_format": None},
        "FP8": {"format": "fp8-tensor", "act_format": "fp8-tensor"},
        "FP8_DYNAMIC": {"format": "fp8", "act_format": "fp8"},
        "FP8_BLOCK": {"format": "fp8-block", "act_format": "fp8-block"},
        "W4A16": _integers(4),
        "W8A16": _integers(8),
        "W8A8": {"format": "int8", "act_format": "int8"},
    }
)
"""Fields of `ptq.Scheme` by name."""


def find_preset(name: str) -> Mapping[str, Any]:
    """The scheme's fields of a preset; case does not matter.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if not isinstance(name, str) or name.upper() not in PRESETS:
        raise unknown_name("preset", str(name), PRESETS)
    return PRESETS[name.upper()]

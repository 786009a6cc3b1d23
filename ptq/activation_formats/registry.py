"""The table of activation formats."""

from __future__ import annotations

from ptq.activation_formats.base import ActivationFormat
from ptq.activation_formats.hardware import (
    BlockFp8,
    MxActivations,
    Nvfp4Activations,
    TensorFp8,
    TokenFp8,
    TokenInt8,
)
from ptq.activation_formats.static_float import find_static_float, static_float
from ptq.errors import unknown_name
from ptq.grids.floating_point import E2M1, E4M3, float_formats

__all__ = ["ACTIVATION_FORMATS", "find_activation_format"]

_ROWS: tuple[ActivationFormat, ...] = (
    Nvfp4Activations(),
    MxActivations("mxfp4", E2M1),
    MxActivations("mxfp8", E4M3),
    TokenFp8(),
    TensorFp8(),
    BlockFp8(),
    TokenInt8(),
    *(static_float(float_formats(bits)[0], suffix) for bits in (4, 8) for suffix in ("static", "shifted", "folded")),
)
ACTIVATION_FORMATS: dict[str, ActivationFormat] = {row.name: row for row in _ROWS}
"""By name. Static formats of other splits than E2M1 and E4M3 have names likewise: ``e3m0-shifted``."""


def find_activation_format(name: str) -> ActivationFormat:
    """The record of an activation format by its name.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if isinstance(name, str) and name in ACTIVATION_FORMATS:
        return ACTIVATION_FORMATS[name]
    found = find_static_float(name) if isinstance(name, str) else None
    if found is None:
        raise unknown_name("activation format", str(name), ACTIVATION_FORMATS)
    return found

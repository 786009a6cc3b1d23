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
from ptq.activation_formats.static_float import FoldedFloat, ShiftedFloat, StaticFloat
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
    *(
        kind(number)
        for kind in (StaticFloat, ShiftedFloat, FoldedFloat)
        for bits in range(4, 9)
        for number in float_formats(bits)
    ),
)
ACTIVATION_FORMATS: dict[str, ActivationFormat] = {row.name: row for row in _ROWS}


def find_activation_format(name: str) -> ActivationFormat:
    """The record of an activation format by its name.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if not isinstance(name, str) or name not in ACTIVATION_FORMATS:
        raise unknown_name("activation format", str(name), ACTIVATION_FORMATS)
    return ACTIVATION_FORMATS[name]

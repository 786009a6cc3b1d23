"""The table of number formats."""

from __future__ import annotations

from ptq.errors import unknown_name
from ptq.number_formats.base import NumberFormat
from ptq.number_formats.block_float import MXFP4, MXFP8, NVFP4
from ptq.number_formats.float_groups import E1M2, E2M1, E3M0, FP4
from ptq.number_formats.fp8 import FP8, FP8_BLOCK, FP8_TENSOR
from ptq.number_formats.gguf.iq4_nl import IQ4_NL
from ptq.number_formats.gguf.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from ptq.number_formats.int8 import INT8
from ptq.number_formats.integer import INTEGER
from ptq.number_formats.rotated.gaussian import HIGGS, ITQ3S_TERNARY
from ptq.number_formats.rotated.itq3s import ITQ3S, ITQ3S_104

__all__ = ["FORMATS", "find_number_format"]

_ROWS: tuple[NumberFormat, ...] = (
    *(INTEGER, INT8, FP4, E2M1, E3M0, E1M2),
    *(NVFP4, MXFP4, MXFP8, FP8, FP8_TENSOR, FP8_BLOCK),
    *(ITQ3S, ITQ3S_104, ITQ3S_TERNARY, HIGGS),
    *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL),
)
FORMATS: dict[str, NumberFormat] = {row.name: row for row in _ROWS}


def find_number_format(name: str) -> NumberFormat:
    """The record of a number format by its name.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise unknown_name("number format", str(name), FORMATS)
    return FORMATS[name]

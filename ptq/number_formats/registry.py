"""The table of number formats."""

from __future__ import annotations

from ptq.errors import unknown_name
from ptq.number_formats.base import NumberFormat
from ptq.number_formats.fp4 import FP4
from ptq.number_formats.integer import INTEGER

__all__ = ["FORMATS", "find_number_format"]

FORMATS: dict[str, NumberFormat] = {row.name: row for row in (INTEGER, FP4)}


def find_number_format(name: str) -> NumberFormat:
    """The record of a number format by its name.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise unknown_name("number format", str(name), FORMATS)
    return FORMATS[name]

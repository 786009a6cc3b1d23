"""Number formats: one record per representation of a weight (docs/adding-a-number-format.md)."""

from ptq.number_formats.base import NumberFormat, TensorSpec, join_groups
from ptq.number_formats.registry import FORMATS, find_number_format

__all__ = ["FORMATS", "NumberFormat", "TensorSpec", "find_number_format", "join_groups"]

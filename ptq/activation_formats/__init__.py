"""Activation formats: one record per way of rounding a linear's input; `ACTIVATION_FORMATS` is the table."""

from ptq.activation_formats.base import ActivationFormat
from ptq.activation_formats.registry import ACTIVATION_FORMATS, find_activation_format

__all__ = ["ACTIVATION_FORMATS", "ActivationFormat", "find_activation_format"]

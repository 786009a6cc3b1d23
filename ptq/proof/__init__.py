"""Whether what will be written loads where the report says it loads: tried on a skeleton before the run begins."""

from ptq.proof.settle import FormatChoice, settle_format

__all__ = ["FormatChoice", "settle_format"]

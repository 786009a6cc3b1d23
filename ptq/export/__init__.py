"""Export: a finished result in the format of another runtime."""

from ptq.export.job import EXPORT_FORMATS, export

__all__ = ["EXPORT_FORMATS", "export"]

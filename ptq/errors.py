"""The exception tree, under the package users import (see `calib.errors` for the drawing and the exit codes)."""

from calib.errors import (
    DataError,
    ModelError,
    NumericalError,
    OutputError,
    PtqError,
    UsageError,
    WorkersError,
    unknown_name,
)

__all__ = [
    "DataError",
    "ModelError",
    "NumericalError",
    "OutputError",
    "PtqError",
    "UsageError",
    "WorkersError",
    "unknown_name",
]

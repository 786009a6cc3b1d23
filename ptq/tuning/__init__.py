"""End-to-end tuning of a finished result: its norms learn what its rounded weights cannot say."""

from ptq.tuning.config import TuneConfig
from ptq.tuning.run import TuneResult, tune

__all__ = ["TuneConfig", "TuneResult", "tune"]

"""ptq: post-training quantization of causal language models. These names are promised; everything else may move."""

from calib.data.tokens import Calibration, load_calibration
from ptq.allocation import Plan, plan
from ptq.api import forecast, quantize
from ptq.errors import PtqError
from ptq.integration.loading import load
from ptq.integration.transformers import register
from ptq.methods import METHODS, LayerMethod
from ptq.pipeline.dry_run.forecast import Forecast
from ptq.pipeline.events import Event
from ptq.quantized import QuantizedWeight
from ptq.recipe import CalibrationSpec, Recipe
from ptq.report import LayerRecord, Report
from ptq.scheme import Scheme

__all__ = [
    "METHODS",
    "Calibration",
    "CalibrationSpec",
    "Event",
    "Forecast",
    "LayerMethod",
    "LayerRecord",
    "Plan",
    "PtqError",
    "QuantizedWeight",
    "Recipe",
    "Report",
    "Scheme",
    "forecast",
    "load",
    "load_calibration",
    "plan",
    "quantize",
]

register()

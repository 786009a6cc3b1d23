"""ptq: post-training quantization of causal language models. These names are promised; everything else may move."""

from calib.data.tokens import Calibration, load_calibration
from ptq.api import forecast, quantize
from ptq.errors import PtqError
from ptq.events import Event
from ptq.forecasting import Forecast
from ptq.integration.transformers import register
from ptq.loading import load
from ptq.methods import METHODS, LayerMethod
from ptq.quantized import LayerRecord, QuantizedWeight
from ptq.recipe import CalibrationSpec, Recipe
from ptq.report import Report
from ptq.scheme import Scheme

__all__ = [
    "METHODS",
    "Calibration",
    "CalibrationSpec",
    "Event",
    "Forecast",
    "LayerMethod",
    "LayerRecord",
    "PtqError",
    "QuantizedWeight",
    "Recipe",
    "Report",
    "Scheme",
    "forecast",
    "load",
    "load_calibration",
    "quantize",
]

register()

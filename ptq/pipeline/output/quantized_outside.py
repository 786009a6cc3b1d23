"""The embedding and the head rounded to nearest, with their records."""

from __future__ import annotations

import time

from torch import Tensor

from ptq.methods import LayerMethod, find_method, make_config
from ptq.pipeline.preparation.schemes.outside import OUTSIDE_METHOD
from ptq.quantized import QuantizedWeight
from ptq.report import LayerRecord
from ptq.scheme import Scheme

__all__ = ["quantize_outside"]


def quantize_outside(name: str, weight: Tensor, scheme: Scheme) -> tuple[QuantizedWeight, LayerRecord]:
    """Round a weight outside the blocks to nearest, on searched scales.

    Args:
        name: of its module.
        weight: ``[out, in]``.
        scheme: how it is stored.
    """
    start, method = time.perf_counter(), find_method(OUTSIDE_METHOD)
    assert isinstance(method, LayerMethod)
    target = weight.float()
    shared = scheme.number_format.share([target], scheme)
    found = method.quantize(target, None, scheme, make_config(method, {}), shared).weight
    record = LayerRecord(
        name=name,
        method=method.name,
        scheme=scheme.record(),
        shape=found.shape,
        bits_per_weight=found.bits_per_weight,
        payload_bytes=found.payload_bytes,
        seconds=time.perf_counter() - start,
    )
    return found, record

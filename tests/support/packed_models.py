"""Tiny models whose blocks' linears are packed, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptq.integration.swap import share_inputs
from ptq.quantized import QuantizedWeight
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

__all__ = ["packed_model", "quantized"]


def quantized(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Rounded to nearest."""
    record = scheme.number_format
    grid = record.grid(record.fit(weight, scheme, "minmax"), scheme, weight.shape[1])
    return QuantizedWeight.from_grid(grid.round(weight), grid, scheme)


def packed_model(scheme: Scheme, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model in evaluation mode; its head and embedding stay as they are."""
    model = tiny_model(family, dtype, **changes)
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in n]:
        owner, _, leaf = name.rpartition(".")
        weight = linear.weight.detach().float()
        new = QuantLinear.from_quantized(quantized(weight, scheme), linear.bias)
        setattr(model.get_submodule(owner), leaf, new.to(dtype).eval())
    share_inputs(model)
    return model

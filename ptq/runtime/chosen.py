"""Which kernels a model's packed linears run on, in one line for people."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ptq.runtime.linear import QuantLinear

__all__ = ["kernel_line"]


def kernel_line(model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """E.g. ``"packed linears run on: cpu (210)"``; ``None`` for a model without packed linears.

    Args:
        model: on its device.
        dtype: of activations; that of the linears by default.

    Raises:
        UsageError: ``PTQ_KERNEL`` names a kernel that does not serve a linear.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            like = module.weight if dtype is None else module.weight.to(dtype)
            counts[module.kernel_name(like)] += 1
    if not counts:
        return None
    return "packed linears run on: " + ", ".join(f"{name} ({count})" for name, count in counts.most_common())

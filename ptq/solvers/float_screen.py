"""Errors of a weight's rows at every clip ratio at once, from a table.

A weight that is the part ``u`` of its row's largest magnitude has, at a clip ratio, the rounding error ``e(u)`` times
that magnitude. A table of ``e`` with a row for every one of 256 values of ``u`` and a column for every ratio turns the
sums over a row's weights into `torch.nn.functional.embedding_bag`: 48 ratios cost half of what rounding the row once
costs. The sums are those of a `Sketch`; scales are not rounded to how they are stored.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from calib.precision import product
from ptq.grids.floating_point import FloatFormat
from ptq.solvers.float_errors import Sketch

__all__ = ["screen"]

_POSITIONS = 256
_ROW_CHUNK, _DEVICE_ROW_CHUNK = 1 << 17, 1 << 25  # weights at once: bounds the temporaries


def screen(weight: Tensor, sketch: Sketch, number: FloatFormat, ratios: tuple[float, ...]) -> Tensor:
    """Estimated errors ``[out, ratios]``, without what no weight changes.

    Args:
        weight: float32 ``[out, n]``.
        sketch: of the errors.
        number: the format.
        ratios: clip ratios.
    """
    limit = _ROW_CHUNK if weight.device.type == "cpu" else _DEVICE_ROW_CHUNK
    step = max(1, limit // weight.shape[1])
    table = _table(number, ratios, weight.device)
    return torch.cat([_screen(weight[i : i + step], sketch, table) for i in range(0, len(weight), step)])


def _screen(weight: Tensor, sketch: Sketch, table: Tensor) -> Tensor:
    top = weight.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(weight.dtype).tiny)
    unit = weight / top
    position = (unit.abs() * _POSITIONS).clamp_(max=_POSITIONS - 1).to(torch.int32)

    def sums(values: Tensor, factors: Tensor) -> Tensor:
        return embedding_bag(position, values, mode="sum", per_sample_weights=factors.expand_as(weight).contiguous())

    found = sums(table.square(), sketch.rest)
    if sketch.rest_drift is not None:
        found += sums(2 * _middles(weight.device)[:, None] * table, sketch.rest_drift)
    sign = unit.sign()
    for index, direction in enumerate(sketch.seen):
        moved = sums(table, sign * direction)
        if sketch.drift is not None:
            moved += product(unit, sketch.drift[index, :, None])
        found += moved.square_()
    return found.mul_(top.square())


@functools.lru_cache(maxsize=64)
def _table(number: FloatFormat, ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """``e(u)`` float32 ``[positions, ratios]``."""
    unit = _middles(torch.device("cpu"))[:, None]
    scale = torch.tensor(ratios) / number.maximum
    return (number.round(unit / scale) * scale - unit).to(device)


def _middles(device: torch.device) -> Tensor:
    return (torch.arange(_POSITIONS, device=device) + 0.5) / _POSITIONS

"""Scales refitted after rounding: the same quadratic, minimised over the scales with all codes held.

A scale multiplies the values of its columns, so along one scale of one row the loss ``||(T - Q) U||^2`` is a parabola:

    Q_g -> f Q_g ,        f = 1 + <(T - Q) H, Q_g> / <Q_g H, Q_g> .

Scales are taken one after the other (block coordinate descent), for all rows at once. The scale is rounded as it is
stored, and a row takes it only if its loss falls, so the loss never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.precision import product
from ptq.solvers.cholesky import Factor

__all__ = ["refit_flops", "refit_scales"]


def refit_scales(target: Tensor, values: Tensor, factor: Factor, scale: Tensor, group: Tensor) -> Tensor:
    """Scales with which the codes fit the target better.

    Args:
        target: float32 ``[m, n]`` in the original column order.
        values: ``[m, n]``, the codes' values with the present scales; not changed.
        factor: order and damped Hessian.
        scale: ``[m, groups]`` in the dtype they are stored in; the values of a group are proportional to its scale.
        group: int64 ``[n]``, the scale of every column, ascending.

    Returns:
        Scales like ``scale``, rounded to its dtype.
    """
    order, result = factor.order, scale.clone()
    place = torch.argsort(order)
    hessian = factor.hessian[place][:, place]
    gradient = product(target - values, hessian)  # (T - Q) H
    largest = torch.finfo(scale.dtype).max
    start = 0
    for number, size in enumerate(torch.bincount(group, minlength=scale.shape[1]).tolist()):
        part = slice(start, start + size)
        start += size
        moved = product(values[:, part], hessian[part])  # what the gradient loses as the scale doubles
        slope, curve = (values[:, part] * gradient[:, part]).sum(1), (values[:, part] * moved[:, part]).sum(1)
        old = scale[:, number].float()
        wanted = old * (1 + slope / curve)  # not a number where all values are zero
        new = wanted.clamp(-largest, largest).to(scale.dtype)
        step = new.float() / old - 1
        better = (curve * step.square() < 2 * slope * step) & (new.float() * old > 0)
        result[:, number] = torch.where(better, new.float(), old).to(scale.dtype)
        gradient -= torch.where(better, step, 0.0)[:, None] * moved
    return result


def refit_flops(rows: int, width: int) -> int:
    """Floating-point operations of `refit_scales`: the Hessian multiplied out, two products with it."""
    return 2 * width**3 + 4 * rows * width * width

"""What a quantized weight costs at its own output, from the statistics that a method gathered anyway."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib.precision import gram_bounds, product
from calib.stats import LinearStatistics
from ptq.errors import NumericalError
from ptq.quantized import QuantizedWeight

__all__ = ["MAX_ENERGY", "check_energy", "layer_losses", "losses_flops", "lost_energy"]

MAX_ENERGY = 1e34
"""Largest output energy ``||W||^2 ||X~||^2`` of a linear: float32 ends at 3e38, and solvers need some orders of
magnitude above what they start from."""


def check_energy(weight: Tensor, stats: LinearStatistics | None) -> None:
    """Refuse a linear for whose outputs float32 is too narrow, before a solver works on it.

    The bound is taken from norms in float64, which cannot overflow here.

    Args:
        weight: float32 ``[out, in]``.
        stats: what was gathered on its inputs; without, there is nothing to check.

    Raises:
        NumericalError: states the bound and the limit; the caller knows the linear's name.
    """
    if stats is None:
        return
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    energy = norm**2 * float(stats.hessian.diagonal().sum(dtype=torch.float64))
    if not energy <= MAX_ENERGY:
        raise NumericalError(
            f"the squares of its outputs reach {energy:.3g}, and up to {MAX_ENERGY:g} fit a solve in float32 (norm of "
            f"the weight {norm:.3g}). Is the checkpoint damaged? If not, leave the layer out with --ignore."
        )


def layer_losses(
    weight: Tensor, quantized: QuantizedWeight, stats: LinearStatistics | None
) -> tuple[float | None, float | None]:
    """Relative output errors of nearest rounding (on the same scales) and of what was chosen.

    With the full-precision inputs X known, ``||W X - Q X~||^2 / ||W X||^2``, expanded to

        ||(W - Q) X~||^2 + 2 <W D, W - Q> + ||W dX||^2      over the same with Q = 0;

    with one stream only, ``||(W - Q) X~||^2 / ||W X~||^2``.

    Args:
        weight: float32 ``[out, in]``.
        quantized: the result.
        stats: what was gathered.

    Returns:
        ``(nearest, chosen)``, or ``(None, None)`` without statistics.

    Raises:
        NumericalError: an error is not finite; the caller knows the linear's name.
    """
    if stats is None:
        return None, None
    pull = product(weight, stats.mismatch) if stats.has_mismatch else None
    constant = float(stats.energy.sum()) if pull is not None else 0.0

    def error(difference: Tensor) -> float:
        value = _quadratic(difference, stats.hessian)
        return value + constant + (2 * float((pull * difference).sum()) if pull is not None else 0.0)

    size = error(weight)
    if size <= 0:
        return 0.0, 0.0
    grid = quantized.scaled_grid()
    nearest = grid.dequantize(grid.round(weight))
    found = error(weight - nearest) / size, error(weight - grid.dequantize(quantized.codes)) / size
    if not all(map(math.isfinite, (size, *found))):
        raise NumericalError(
            f"its output error is not finite ({found[0]:g} for nearest rounding, {found[1]:g} for what was chosen, of "
            f"{size:g}). Is the checkpoint damaged? If not, leave the layer out with --ignore."
        )
    return found


def losses_flops(rows: int, width: int, *, mismatch: bool) -> int:
    """Floating-point operations of `layer_losses`: three quadratic forms, and W D if there are two streams."""
    triangle = sum((stop - start) * (width - start) for start, stop in gram_bounds(width))
    return 2 * rows * (3 * triangle + (width * width if mismatch else 0))


def _quadratic(difference: Tensor, hessian: Tensor) -> float:
    """``<E H, E>`` with the upper triangle of H only: a block right of the diagonal counts twice."""
    total = 0.0
    for start, stop in gram_bounds(len(hessian)):
        part = product(difference[:, start:stop], hessian[start:stop, start:]).mul_(difference[:, start:])
        total += 2 * float(part.sum()) - float(part[:, : stop - start].sum())
    return total


def lost_energy(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Relative squared error of the weight, where no inputs say what its output loses; 0 for a weight of zeros."""
    largest = weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # the squares of 1e-30 are no numbers
    energy = (weight / largest).square().sum()
    lost = (quantized.dequantize().to(weight.device).sub_(weight) / largest).square().sum()
    return float(lost / energy) if energy > 0 else 0.0

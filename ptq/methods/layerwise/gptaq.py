"""GPTAQ (arXiv 2504.02692): GPTQ whose target also follows the full-precision inputs, column by column.

With ``H^-1 = V^T V`` (V upper triangular) and ``D = (X - X~) X~^T`` the sweep adds ``w_i P_ij`` to every later column
j,

    P = strength * ((D V^T) o M) V,        M = strictly upper triangular ones,

where w_i is the column before rounding. 0.25 is the published code's default strength, 1 the paper's objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from calib.precision import product
from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError
from ptq.grids import ScaleSearch
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import check_damping, check_scales, fit_grid, group_factor, require
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme
from ptq.solvers import Factor, successive_rounding, sweep_flops

__all__ = ["GPTAQ", "GptaqConfig", "drift_matrix"]


@dataclasses.dataclass(frozen=True)
class GptaqConfig:
    """Args:
    strength: 0 (GPTQ) to 1.
    damping: fraction of the Hessian's mean diagonal added to it.
    act_order: columns in descending order of the diagonal.
    scales: ``minmax``, ``pnorm`` or ``hessian``.
    """

    strength: float = 0.25
    damping: float = 0.01
    act_order: bool = True
    scales: ScaleSearch = "pnorm"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_scales(self.scales)
        if not 0.0 <= self.strength <= 1.0:
            raise UsageError(f"gptaq: strength is 0 to 1, got {self.strength!r}.")


def needs(config: GptaqConfig) -> frozenset[Stat]:
    return frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})  # the energy is for the record


def drift_matrix(factor: Factor, mismatch: Tensor, strength: float) -> Tensor:
    """``P`` float32 ``[n, n]``, strictly upper triangular, in processing order; ``mismatch`` is D in original order."""
    identity = torch.eye(len(mismatch), device=mismatch.device)
    v = torch.linalg.solve_triangular(factor.upper, identity, upper=True)
    ordered = mismatch.index_select(0, factor.order).index_select(1, factor.order)
    drift: Tensor = strength * product(product(ordered, v.T).triu_(1), v).triu_(1)
    return drift


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: GptaqConfig,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Round ``weight`` ``[out, in]`` with error compensation and a drifting target."""
    stats = require(stats)
    factor, flops = group_factor(stats, config.damping, "descending" if config.act_order else "natural")
    mismatch, width = stats.mismatch, weight.shape[1]

    def make() -> Tensor:
        nonlocal flops
        flops += 5 * width**3  # an inverse and two products
        return drift_matrix(factor, mismatch, config.strength)

    drift = stats.group.memo(("drift", config), make)
    grid = fit_grid(weight, scheme, config.scales, stats, shared)
    codes, _ = successive_rounding(weight, grid, factor, drift=drift)
    flops += 2 * sweep_flops(*weight.shape)
    weight_q = QuantizedWeight.from_grid(codes, grid, scheme)
    return LayerResult(weight_q, {"alpha": config.strength, "damping": factor.damping}, factor.notes, flops)


GPTAQ = LayerMethod("gptaq", "GPTQ towards the full-precision model's outputs", GptaqConfig, needs, quantize)

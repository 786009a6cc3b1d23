"""GPTQ (arXiv 2210.17323): each column takes over the rounding errors of the columns before it.

Minimises ``||(W - Q) X~||^2`` by successive rounding. ``act_order`` takes the columns with the largest inputs first;
``static_groups`` fits all scales before rounding (needed with act-order, because formats without a group index store
consecutive channels together); otherwise a group's scales are fitted to its error-compensated columns.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError
from ptq.grids import BoundGrid, ScaleSearch, fit_scales
from ptq.methods.base import LayerMethod, LayerResult, finish
from ptq.methods.common import check_damping, check_scales, fit_grid, group_factor, require
from ptq.scheme import Scheme
from ptq.solvers import Factor, successive_rounding, sweep_flops

__all__ = ["GPTQ", "GptqConfig"]


@dataclasses.dataclass(frozen=True)
class GptqConfig:
    """Args:
    damping: fraction of the Hessian's mean diagonal added to it.
    act_order: columns in descending order of the diagonal.
    static_groups: scales fitted before rounding.
    scales: ``minmax``, ``pnorm`` or ``hessian``.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    scales: ScaleSearch = "pnorm"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_scales(self.scales)
        if self.act_order and not self.static_groups:
            raise UsageError(
                "gptq: act_order needs static_groups: scales fitted along a permuted order need a group index that "
                "current checkpoint formats do not carry. Set act_order=false or static_groups=true."
            )


def needs(config: GptqConfig) -> frozenset[Stat]:
    return frozenset({Stat.HESSIAN})


def quantize(weight: Tensor, stats: LinearStatistics | None, scheme: Scheme, config: GptqConfig) -> LayerResult:
    """Round ``weight`` ``[out, in]`` with error compensation."""
    stats = require(stats)
    factor, flops = group_factor(stats, config.damping, "descending" if config.act_order else "natural")
    if config.static_groups:
        grid = fit_grid(weight, scheme, config.scales, stats)
        codes, _ = successive_rounding(weight, grid, factor)
    else:
        codes, grid = _dynamic_groups(weight, stats, scheme, config, factor)
    flops += sweep_flops(*weight.shape)
    return LayerResult(finish(codes, grid, scheme), damping=factor.damping, notes=factor.notes, flops=flops)


def _dynamic_groups(
    weight: Tensor, stats: LinearStatistics, scheme: Scheme, config: GptqConfig, factor: Factor
) -> tuple[Tensor, BoundGrid]:
    """Natural order; a group's scales are fitted to its columns with the errors of all groups before it."""
    size = scheme.group_size or weight.shape[1]
    one_group = dataclasses.replace(scheme, group_size=None)
    grid = fit_grid(weight, scheme, "minmax", stats)
    importance = stats.hessian.diagonal() if config.scales == "hessian" else None

    def refit(start: int, stop: int, columns: Tensor) -> BoundGrid:
        part = None if importance is None else importance[start:stop]
        scale, zero = fit_scales(columns.contiguous(), one_group, config.scales, part)
        grid.scale[:, start // size] = scale[:, 0].float()
        if zero is not None:
            grid.zero[:, start // size] = zero[:, 0].float()
        return grid

    codes, grid = successive_rounding(weight, grid, factor, refit=refit, block=size)
    return codes, dataclasses.replace(grid, group=scheme.group_index(weight.shape[1], torch.device(weight.device)))


GPTQ = LayerMethod("gptq", "error-compensated rounding (GPTQ)", GptqConfig, needs, quantize)

"""GPTQ (arXiv 2210.17323): each column takes over the rounding errors of the columns before it.

Minimises ``||(W - Q) X~||^2`` by successive rounding. ``act_order`` takes the columns with the largest inputs first;
``static_groups`` fits all scales before rounding (needed with act-order, because formats without a group index store
consecutive channels together); otherwise a group's scales are fitted to its error-compensated columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError
from ptq.grids import ScaledGrid, ScaleSearch
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import check_damping, check_scales, fit_grid, group_factor, require
from ptq.methods.refinement import check_passes, refine, refine_flops
from ptq.number_formats import join_groups
from ptq.quantized import QuantizedWeight
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
    cd_passes: sweeps of coordinate descent after rounding.
    refit_passes: how often scales are refitted to the codes by least squares, each time after ``cd_passes`` sweeps.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    scales: ScaleSearch = "pnorm"
    cd_passes: int = 0
    refit_passes: int = 0

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_scales(self.scales)
        check_passes("gptq", cd_passes=self.cd_passes, refit_passes=self.refit_passes)
        if self.act_order and not self.static_groups:
            raise UsageError(
                "gptq: act_order needs static_groups: scales fitted along a permuted order need a group index that "
                "current checkpoint formats do not carry. Set act_order=false or static_groups=true."
            )


def needs(config: GptqConfig) -> frozenset[Stat]:
    return frozenset({Stat.HESSIAN})


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: GptqConfig,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Round ``weight`` ``[out, in]`` with error compensation."""
    stats = require(stats)
    factor, flops = group_factor(stats, config.damping, "descending" if config.act_order else "natural")
    if config.static_groups:
        grid = fit_grid(weight, scheme, config.scales, stats, shared)
        codes, _ = successive_rounding(weight, grid, factor)
    else:
        codes, grid = _dynamic_groups(weight, stats, scheme, config, factor, shared)
    codes, grid, notes = refine(
        weight, codes, grid, factor, scheme, cd_passes=config.cd_passes, refit_passes=config.refit_passes
    )
    flops += sweep_flops(*weight.shape) + refine_flops(weight.shape, config.cd_passes, config.refit_passes)
    weight_q = QuantizedWeight.from_grid(codes, grid, scheme)
    return LayerResult(weight_q, {"damping": factor.damping}, (*factor.notes, *notes), flops)


def _dynamic_groups(
    weight: Tensor,
    stats: LinearStatistics,
    scheme: Scheme,
    config: GptqConfig,
    factor: Factor,
    shared: Mapping[str, Tensor] | None,
) -> tuple[Tensor, ScaledGrid]:
    """Natural order; a group's scales are fitted to its columns with the errors of all groups before it."""
    record, size = scheme.number_format, scheme.group_size or weight.shape[1]
    if scheme.number_format.fixed_groups:
        raise UsageError(
            f"gptq: static_groups=false fits scales to single groups while it rounds, and those of {scheme.format} are "
            "fitted before. Set static_groups=true."
        )
    importance = stats.hessian.diagonal() if config.scales == "hessian" else None
    found: list[Mapping[str, Tensor]] = []

    def refit(start: int, stop: int, columns: Tensor) -> ScaledGrid:
        part = None if importance is None else importance[start:stop]
        found.append(record.fit(columns.contiguous(), scheme, config.scales, part, shared))
        one = record.grid(found[-1], scheme, stop - start)
        return dataclasses.replace(one, group=weight.new_zeros(weight.shape[1], dtype=torch.int64))

    first = record.grid(record.fit(weight[:, :size], scheme, "minmax"), scheme, size)
    first = dataclasses.replace(first, group=weight.new_zeros(weight.shape[1], dtype=torch.int64))
    codes, _ = successive_rounding(weight, first, factor, refit=refit, block=size)
    return codes, record.grid(join_groups(found), scheme, weight.shape[1])


GPTQ = LayerMethod("gptq", "error-compensated rounding (GPTQ)", GptqConfig, needs, quantize)

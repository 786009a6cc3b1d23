"""Round to nearest: every weight to its nearest grid value. Needs no data; the baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.grids import ScaleSearch
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import check_scales, fit_grid
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme

__all__ = ["RTN", "RtnConfig"]


@dataclasses.dataclass(frozen=True)
class RtnConfig:
    """Args:
    scales: ``minmax``, ``pnorm`` or ``hessian`` (the last needs calibration data).
    """

    scales: ScaleSearch = "pnorm"

    def __post_init__(self) -> None:
        check_scales(self.scales)


def needs(config: RtnConfig) -> frozenset[Stat]:
    return frozenset({Stat.HESSIAN}) if config.scales == "hessian" else frozenset()


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: RtnConfig,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Round ``weight`` ``[out, in]`` to nearest."""
    grid = fit_grid(weight, scheme, config.scales, stats, shared)
    return LayerResult(QuantizedWeight.from_grid(grid.round(weight), grid, scheme))


RTN = LayerMethod("rtn", "round to nearest; no data", RtnConfig, needs, quantize)

"""Rotated 3-bit codebooks, without data or with it.

Without data a rotation alone makes a model worse, although every weight is rounded better: input channels that carry
the largest activations have the smallest weights (a norm's gain, weight decay), plain rounding leaves those nearly
exact, and a rotation spreads the rounding error evenly over all channels. So rounding here shapes its error as GPTQ
does, with a Hessian that is guessed from the weight alone: input channel j is taken to have the second moment

    h_j = (mean_j / mean_i w_ij^2)^shaping ,        H = R diag(h) R^T   for rotated inputs,

and successive rounding moves the error to where ``h`` is small. ``shaping=0`` is plain rounding.

With data (``solver=coreq`` or ``gptq``, the default once calibration data is named) it is that method on the same
number format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from calib.stats import LinearStatistics, Stat
from ptq.errors import UsageError, unknown_name
from ptq.grids import ScaleSearch
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import check_damping, check_scales, fit_grid
from ptq.methods.layerwise import coreq, gptq
from ptq.methods.refinement import refine, refine_flops
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme
from ptq.solvers import Order, factorize, factorize_flops, successive_rounding, sweep_flops
from ptq.transforms.hadamard import InputRotation

__all__ = ["ITQ3S", "Itq3sConfig", "guessed_hessian"]

Solver = Literal["none", "coreq", "gptq"]
SOLVERS: tuple[Solver, ...] = ("none", "coreq", "gptq")
_LEAST = 1e-3  # of a channel's energy, relative to the mean
_LARGEST = 30.0  # of a channel's guessed second moment, relative to the median
_DAMPING = 1e-4  # of the guessed Hessian


@dataclasses.dataclass(frozen=True)
class Itq3sConfig:
    """Args:
    solver: ``none`` needs no data; ``coreq`` or ``gptq`` round with the Hessian of the calibration data.
    shaping: without data, how strongly small weights are taken for large inputs; 0 to 2, 0 is plain rounding.
    beam: with data, beams per row (coreq).
    cd_passes: sweeps of coordinate descent after rounding.
    refit_passes: how often scales are refitted to the codes, each time after ``cd_passes`` sweeps.
    order: with data, of columns: ``descending``, ``natural`` or ``min_pivot`` (coreq).
    damping: with data, fraction of the Hessian's mean diagonal added to it.
    scales: ``pnorm`` or ``hessian``, the latter with data only.
    """

    solver: Solver = "none"
    shaping: float = 1.0
    beam: int = 1
    cd_passes: int = 0
    refit_passes: int = 0
    order: Order = "descending"
    damping: float = 0.01
    scales: ScaleSearch = "pnorm"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise unknown_name("solver", self.solver, SOLVERS)
        check_damping(self.damping)
        check_scales(self.scales)
        if not 0.0 <= self.shaping <= 2.0:
            raise UsageError(f"itq3s: shaping is 0 to 2, got {self.shaping!r}.")
        if self.scales == "hessian" and self.solver == "none":
            raise UsageError("itq3s: scales=hessian needs calibration data; give --calib, or solver=coreq.")
        self._check_used()
        self.coreq()  # checks beam, order and passes

    def _check_used(self) -> None:
        """Check that options which were set are those of the solver that runs."""
        unused = {
            "none": (("beam", "order", "damping"), "a solver with calibration data: give --calib"),
            "gptq": (("beam", "order", "shaping"), "another solver: give solver=coreq, or none for shaping"),
            "coreq": (("shaping",), "solver=none, which rounds without data: leave out --calib"),
        }
        names, owner = unused[self.solver]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"itq3s: {name}={getattr(self, name)} belongs to {owner}, or leave {name} out (the solver is "
                    f"{self.solver})."
                )

    def coreq(self) -> coreq.CoreqConfig:
        """The same for the solver ``coreq``."""
        return coreq.CoreqConfig(
            beam=self.beam,
            cd_passes=self.cd_passes,
            refit_passes=self.refit_passes,
            order=self.order,
            damping=self.damping,
            scales=self.scales,
        )

    def gptq(self) -> gptq.GptqConfig:
        """The same for the solver ``gptq``."""
        return gptq.GptqConfig(
            damping=self.damping, scales=self.scales, cd_passes=self.cd_passes, refit_passes=self.refit_passes
        )


def needs(config: Itq3sConfig) -> frozenset[Stat]:
    if config.solver == "none":
        return frozenset()
    return coreq.needs(config.coreq()) if config.solver == "coreq" else gptq.needs(config.gptq())


def guessed_hessian(weight: Tensor, rotation: InputRotation | None, shaping: float) -> Tensor:
    """Second moments of a linear's inputs as its weight suggests them, float32 ``[in, in]``.

    Args:
        weight: ``[out, in]``, for rotated inputs if there is a rotation.
        rotation: of the input.
        shaping: power of the relation between weights and inputs.
    """
    plain = weight if rotation is None else rotation.inverse(weight)
    energy = plain.square().mean(0)
    relative = energy / energy.mean().clamp(min=torch.finfo(torch.float32).tiny)
    moments = relative.clamp(min=_LEAST) ** -shaping
    moments = moments.clamp(max=float(moments.median()) * _LARGEST)
    hessian = torch.diag(moments)
    return hessian if rotation is None else rotation.on_hessian(hessian)


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: Itq3sConfig,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Round ``weight`` ``[out, in]``."""
    if config.solver == "coreq":
        return coreq.quantize(weight, stats, scheme, config.coreq(), shared or {})
    if config.solver == "gptq":
        return gptq.quantize(weight, stats, scheme, config.gptq(), shared or {})
    grid = fit_grid(weight, scheme, config.scales, None, shared)
    diagonal = not config.shaping or scheme.input_rotation is None  # such a Hessian moves no error
    if diagonal and not config.refit_passes:
        return LayerResult(QuantizedWeight.from_grid(grid.round(weight), grid, scheme))
    rotation = None if scheme.input_rotation is None else InputRotation.of(scheme.input_rotation, weight.shape[1])
    hessian = guessed_hessian(weight, rotation, config.shaping)
    factor = factorize(hessian, _DAMPING, "natural")
    codes, _ = successive_rounding(weight, grid, factor)
    codes, grid, notes = refine(
        weight, codes, grid, factor, scheme, cd_passes=config.cd_passes, refit_passes=config.refit_passes
    )
    flops = factorize_flops(weight.shape[1]) + sweep_flops(*weight.shape)
    flops += refine_flops(weight.shape, config.cd_passes, config.refit_passes)
    return LayerResult(QuantizedWeight.from_grid(codes, grid, scheme), notes=(*factor.notes, *notes), flops=flops)


ITQ3S = LayerMethod(
    "itq3s",
    "rotated 3-bit codebook, 3.125 bits per weight; no data, or CoreQ's rounding with --calib",
    Itq3sConfig,
    needs,
    quantize,
    defaults={"format": "itq3s"},
    with_data={"solver": "coreq"},
)

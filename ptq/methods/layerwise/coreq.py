"""CoreQ (arXiv 2602.05902): correct the target for what earlier layers lost, as far as that is reliable, then round.

Paper's letters: X inputs in the full-precision model, X~ in the model quantized so far, dX = X - X~, M = W dX the
output mismatch, H = X~ X~^T, D = dX X~^T. The part of M that some change of this weight can absorb is R = B X~ with
``B = W D H^-1``; the rest is out of reach. The target is ``W* = W + alpha B`` with one number alpha a linear, by
default

    alpha = <B, W D> / ||W dX||^2 = ||R||^2 / ||M||^2      (``corr``: the R^2 of regressing M on X~).

Then W* is rounded by successive rounding, or by beam search with ``beam`` > 1 (K-CoreQ), and optionally improved by
coordinate descent. Scales are fitted to W*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from calib.precision import product
from calib.stats import LinearStatistics, Moments, Stat
from ptq.errors import UsageError, unknown_name
from ptq.grids import ScaleSearch
from ptq.methods.base import LayerMethod, LayerResult
from ptq.methods.common import check_damping, check_order, check_scales, fit_grid, group_factor, require
from ptq.methods.refinement import check_passes, refine, refine_flops
from ptq.quantized import QuantizedWeight
from ptq.scheme import Scheme
from ptq.solvers import (
    Order,
    beam_flops,
    beam_search,
    factorize,
    factorize_flops,
    solve_flops,
    successive_rounding,
    sweep_flops,
)

__all__ = ["COEFFICIENTS", "COREQ", "CoreqConfig", "coefficient"]

Coefficient = Literal["corr", "fixed", "row", "js", "cv"]
COEFFICIENTS: tuple[Coefficient, ...] = ("corr", "fixed", "row", "js", "cv")
Outliers = Literal["full", "bounded"]
OUTLIERS: tuple[Outliers, ...] = ("full", "bounded")


@dataclasses.dataclass(frozen=True)
class CoreqConfig:
    """Args:
    coefficient: ``corr`` (R^2), ``row`` (R^2 of every output row), ``fixed`` (``alpha``), ``js`` (James-Stein shrinkage
        with the effective number of tokens), ``cv`` (two-fold cross-validation over sequences).
    alpha: the value of ``fixed``, 0 (GPTQ's target) to 1.
    beam: beams a row; 1 is successive rounding.
    cd_passes: sweeps of coordinate descent after rounding.
    refit_passes: how often scales are refitted to the codes by least squares, each time after ``cd_passes`` sweeps.
    order: ``descending``, ``natural`` or ``min_pivot``.
    damping: fraction of the Hessian's mean diagonal added to it.
    token_damping: add the inputs' channels per calibration token instead, where that is more (at most 1): with few
        tokens the solver fits these and not the inputs' distribution.
    scales: ``minmax``, ``pnorm`` or ``hessian``.
    outliers: tokens with huge inputs: ``bounded`` in what they add to the statistics (`calib.token_bounds`), or
        ``full``.
    """

    coefficient: Coefficient = "corr"
    alpha: float = 0.5
    beam: int = 1
    cd_passes: int = 0
    refit_passes: int = 0
    order: Order = "descending"
    damping: float = 0.01
    token_damping: bool = False
    scales: ScaleSearch = "pnorm"
    outliers: Outliers = "full"

    def __post_init__(self) -> None:
        if self.coefficient not in COEFFICIENTS:
            raise unknown_name("coefficient", self.coefficient, COEFFICIENTS)
        if self.outliers not in OUTLIERS:
            raise unknown_name("value of outliers", self.outliers, OUTLIERS)
        check_damping(self.damping)
        check_scales(self.scales)
        check_order(self.order)
        if not 0.0 <= self.alpha <= 1.0:
            raise UsageError(f"coreq: alpha is 0 to 1, got {self.alpha!r}.")
        if not 1 <= self.beam <= 256:
            raise UsageError(f"coreq: beam is 1 to 256, got {self.beam!r}.")
        check_passes("coreq", cd_passes=self.cd_passes, refit_passes=self.refit_passes)


def needs(config: CoreqConfig) -> frozenset[Stat]:
    extra = {"cv": {Stat.FOLDS}, "js": {Stat.EFFECTIVE_TOKENS}}.get(config.coefficient, set())
    extra = extra | ({Stat.BOUNDED} if config.outliers == "bounded" else set())
    return frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY} | extra)


def quantize(
    weight: Tensor,
    stats: LinearStatistics | None,
    scheme: Scheme,
    config: CoreqConfig,
    shared: Mapping[str, Tensor] | None = None,
) -> LayerResult:
    """Correct and round ``weight`` ``[out, in]``."""
    stats = require(stats)
    factor, flops = group_factor(stats, _damping(config, weight.shape[1], stats.group.tokens), config.order)
    pull = product(weight, stats.mismatch)  # W D
    shift = factor.solve(pull)  # B = W D H^-1
    alpha, r2 = coefficient(weight, shift, pull, stats, config)
    target = weight + alpha * shift
    grid = fit_grid(target, scheme, config.scales, stats, shared)
    if config.beam > 1:
        codes = beam_search(target, grid, factor, width=config.beam)
    else:
        codes, _ = successive_rounding(target, grid, factor)
    codes, grid, notes = refine(
        target, codes, grid, factor, scheme, cd_passes=config.cd_passes, refit_passes=config.refit_passes
    )
    figures = {"alpha": float(alpha.mean()), "r2": r2, "damping": factor.damping}
    flops += _flops(weight.shape, config)
    return LayerResult(QuantizedWeight.from_grid(codes, grid, scheme), figures, (*factor.notes, *notes), flops)


def _damping(config: CoreqConfig, channels: int, tokens: float) -> float:
    """The fraction of the mean diagonal; a half of the sequences has half of the tokens."""
    return min(1.0, max(config.damping, channels / max(1.0, tokens))) if config.token_damping else config.damping


def _flops(shape: torch.Size, config: CoreqConfig) -> int:
    """Floating-point operations of one linear, without the group's factor: W D, B, the sweep and its refinements."""
    rows, width = shape
    square = rows * width * width
    folds = 2 * (factorize_flops(width) + solve_flops(rows, width) + 6 * square) if config.coefficient == "cv" else 0
    rounding = beam_flops(rows, width, config.beam) if config.beam > 1 else sweep_flops(rows, width)
    refinement = refine_flops(shape, config.cd_passes, config.refit_passes)
    return 2 * square + solve_flops(rows, width) + folds + rounding + refinement


def coefficient(
    weight: Tensor, shift: Tensor, pull: Tensor, stats: LinearStatistics, config: CoreqConfig
) -> tuple[Tensor, float]:
    """The coefficient alpha and the R^2 of the mismatch.

    Args:
        weight: W ``[m, n]``; shift: ``B = W D H^-1``; pull: ``W D``, all float32 ``[m, n]``.
        stats: the linear's statistics.
        config: which coefficient.

    Returns:
        alpha ``[]`` or, for ``row``, ``[m, 1]``, in [0, 1]; 0 where there is no mismatch. R^2 a float.
    """
    signal, total = (shift * pull).sum(1), stats.energy
    corr = _ratio(signal.sum(), total.sum())
    r2 = float(corr)
    if config.coefficient == "row":
        return _ratio(signal, total)[:, None], r2
    if config.coefficient == "fixed":
        return torch.full_like(corr, config.alpha), r2
    if config.coefficient == "js":
        return _james_stein(float(signal.sum()), float(total.sum()), weight.shape[1], stats.effective_tokens), r2
    if config.coefficient == "cv":
        return _cross_validated(
            weight, stats.group.folds, _damping(config, weight.shape[1], stats.group.tokens / 2)
        ), r2
    return corr, r2


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator`` clipped to [0, 1]; 0 where that is not a number."""
    return (numerator / denominator).nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(0.0, 1.0)


def _james_stein(signal: float, total: float, width: int, tokens: float) -> Tensor:
    """``max(0, 1 - n (total - signal) / ((N - n) signal))`` with N the effective number of tokens."""
    if signal <= 0 or tokens <= width:
        return torch.tensor(0.0)
    return torch.tensor(1 - width * (total - signal) / ((tokens - width) * signal)).clamp(0.0, 1.0)


def _cross_validated(weight: Tensor, folds: tuple[Moments, ...], damping: float) -> Tensor:
    """The alpha that a shift fitted on one half of the sequences deserves on the other half.

    ``alpha = sum <B, W D_val> / sum <B, B H_val>`` over the two ways round, B from the training half.
    """
    top = bottom = torch.zeros((), device=weight.device)
    for train, held_out in ((folds[0], folds[1]), (folds[1], folds[0])):
        if train.mismatch is None or held_out.mismatch is None:
            raise ValueError("folds without the mismatch")
        if not bool(train.hessian.any()):
            raise UsageError(
                "coreq: the coefficient 'cv' needs calibration tokens in both halves of the sequences, and one half "
                "has none here: give more sequences, or take 'corr'."
            )
        shift = factorize(train.hessian, damping, "natural").solve(product(weight, train.mismatch))
        top = top + (shift * product(weight, held_out.mismatch)).sum()
        bottom = bottom + (shift * product(shift, held_out.hessian)).sum()
    return _ratio(top, bottom)


COREQ = LayerMethod(
    "coreq", "mismatch-corrected target, then successive rounding or beam search", CoreqConfig, needs, quantize
)

"""Means, errors and tests on paired measurements, on plain arrays. It knows neither records nor models.

An *independent draw* is what sampling would draw again: a row of a task, a segment or document of a text, or a whole
cluster of rows. Tokens are not draws: those of one segment depend on each other. Every figure here is a ratio
``m = sum(sums) / sum(counts)`` over draws, e.g. nats over tokens, or hits over rows with counts of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtrit

__all__ = [
    "Floats",
    "block_bootstrap",
    "by_cluster",
    "holm",
    "mcnemar",
    "mean_and_error",
    "minimum_detectable",
    "minimum_detectable_flips",
    "neighbours",
    "resamples",
    "safe_exp",
]

Floats = NDArray[np.float64]
_AT_ONCE = 1 << 21  # resampled draws held in memory at the same time: 16 MB per array
_POWER = 0.8  # of `minimum_detectable`: found four times in five
_LEVEL = 0.05  # and tested two-sided at 5 %
_FLIPS_NEEDED = 7.906  # Poisson mean that gives at least 6 flips four times in five; 5 flips all one way have p > 0.05


def mean_and_error(
    sums: NDArray[np.generic], counts: NDArray[np.generic] | None = None, *, clusters: NDArray[np.generic] | None = None
) -> tuple[float, float | None]:
    """A ratio of sums over independent draws, and its standard error.

    With ``s_i`` and ``c_i`` of draw ``i`` and ``m = sum(s) / sum(c)``, the error is that of the linearised ratio,
    ``sqrt(n / (n - 1) * sum((s_i - m c_i)^2)) / sum(c)``. For counts of 1 it is ``sd / sqrt(n)``.

    Args:
        sums: ``[n]``, e.g. nats of each segment.
        counts: ``[n]``, e.g. its tokens; 1 each by default.
        clusters: ``[n]`` labels; rows of one label are summed first and count as one draw.

    Returns:
        The ratio, and its error; ``None`` for fewer than two draws.
    """
    s, c = by_cluster(sums, counts, clusters)
    mean = float(s.sum() / c.sum())
    if len(s) < 2:
        return mean, None
    squares = float(np.square(s - mean * c).sum())
    return mean, math.sqrt(len(s) / (len(s) - 1) * squares) / float(c.sum())


def neighbours(items: int) -> NDArray[np.int64] | None:
    """Clusters of consecutive items of one text, which are alike: ``n^(1/3)`` to a cluster; ``None`` below 27.

    Segments of one article follow each other, and a model that loses on one loses on the next: differences of
    neighbouring segments of WikiText-2 correlate by up to a half. The length is the usual rate of a block bootstrap
    (Hall, Horowitz and Jing 1995).
    """
    length = int(items ** (1 / 3) + 1e-9)
    return None if length < 3 else np.arange(items, dtype=np.int64) // length


def by_cluster(
    sums: NDArray[np.generic], counts: NDArray[np.generic] | None, clusters: NDArray[np.generic] | None
) -> tuple[Floats, Floats]:
    """``(sums, counts)`` of the independent draws, float64 ``[draws]`` each; arguments as in `mean_and_error`."""
    s = np.asarray(sums, dtype=np.float64)
    c = np.ones(len(s)) if counts is None else np.asarray(counts, dtype=np.float64)
    if clusters is None:
        return s, c
    _, group = np.unique(clusters, return_inverse=True)
    return np.bincount(group, s).astype(np.float64), np.bincount(group, c).astype(np.float64)


def block_bootstrap(
    sums: NDArray[np.generic],
    counts: NDArray[np.generic] | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
    clusters: NDArray[np.generic] | None = None,
) -> Floats:
    """Ratios of ``draws`` samples of as many blocks, drawn with replacement.

    Its standard deviation is the error that `mean_and_error` finds without drawing, less a factor of
    ``sqrt((n - 1) / n)``. Its percentiles are too narrow for few blocks: `evals.comparison.intervals` studentises them.

    Args:
        sums: ``[items]``, as in `mean_and_error`.
        counts: ``[items]``, as in `mean_and_error`.
        clusters: ``[items]``, as in `mean_and_error`.
        draws: number of samples.
        seed: of the draws; the same seed gives the same array.

    Returns:
        Float64 ``[draws]``. The memory does not grow with ``draws x blocks``.
    """
    s, c = by_cluster(sums, counts, clusters)
    return np.concatenate([s[index].sum(axis=1) / c[index].sum(axis=1) for index in resamples(len(s), draws, seed)])


def resamples(blocks: int, draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of blocks drawn with replacement, int64 ``[some draws, blocks]`` at a time, ``draws`` rows in all."""
    generator = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // blocks)
    for start in range(0, draws, step):
        yield generator.integers(blocks, size=(min(step, draws - start), blocks))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of no difference, given the items that changed sides.

    Items that both models answer alike say nothing. Of the others each is won or lost with probability 1/2 if there is
    no difference: ``p = min(1, 2 * P(Binomial(lost + won, 1/2) <= min(lost, won)))`` (McNemar 1947, exact form).

    Args:
        lost: right in the reference, wrong in the candidate.
        won: the other way round.
    """
    changed = lost + won
    return 1.0 if changed == 0 else min(1.0, 2.0 * float(bdtr(float(min(lost, won)), changed, 0.5)))


def minimum_detectable(error: float, freedom: float = math.inf) -> float:
    """The smallest true difference that a sample finds four times in five, tested two-sided at 5 %.

    It is ``(t_0.975 + t_0.8) * error``, which for many draws is the familiar ``2.8 * error``.

    Args:
        error: standard error of the difference.
        freedom: degrees of freedom of ``error``, e.g. draws less one.
    """
    return _both_quantiles(freedom) * error


def minimum_detectable_flips(rate: float, items: int) -> float:
    """As `minimum_detectable`, for the difference of two accuracies: ``2.8 * sqrt(rate / items)``.

    No fewer than six flips, all in one direction, can be significant at 5 %. With hardly any flips the limit is
    therefore the difference that gives six of them four times in five, ``7.9 / items``, and at most 1.

    Args:
        rate: share of items that changed sides, ``(lost + won) / items``.
        items: number of items.
    """
    return min(1.0, max(_both_quantiles(math.inf) * math.sqrt(rate / items), _FLIPS_NEEDED / items))


def _both_quantiles(freedom: float) -> float:
    t = 1e9 if math.isinf(freedom) else freedom
    return float(stdtrit(t, 1 - _LEVEL / 2) + stdtrit(t, _POWER))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being the best of several (Holm 1979), in the order given.

    The chance that any of them falls below a level by accident is at most that level, however they depend on each
    other. The smallest is multiplied by their number, the next by one less; none falls below one before it.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def safe_exp(value: float) -> float | None:
    """``exp(value)``, or ``None`` where that overflows."""
    return math.exp(value) if value < 709.0 else None

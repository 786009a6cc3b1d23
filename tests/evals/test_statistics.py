"""Means, errors, intervals and tests against slow formulas, enumeration, scipy.stats and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evals import statistics
from evals.comparison.intervals import MOST_BLOCKS, accuracy_inference, freedom_of_sum, paired_inference, t_inference
from evals.statistics import (
    block_bootstrap,
    by_cluster,
    holm,
    mcnemar,
    mean_and_error,
    minimum_detectable,
    minimum_detectable_flips,
    resamples,
)

FINITE = st.floats(-1e3, 1e3)


@given(st.lists(FINITE, min_size=2, max_size=30))
def test_error_of_plain_values_is_sd_over_root_n(values: list[float]) -> None:
    mean, error = mean_and_error(np.array(values))
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_error_of_a_ratio_by_hand() -> None:
    # m = 18 / 6 = 3; residuals 4 - 3, 6 - 6, 8 - 9 -> squares 1, 0, 1; sqrt(3 / 2 * 2) / 6
    assert mean_and_error(np.array([4, 6, 8]), np.array([1, 2, 3])) == pytest.approx((3.0, math.sqrt(3.0) / 6))


def test_error_of_a_ratio_is_what_sampling_shows() -> None:
    rng = np.random.default_rng(1)
    ratios, errors = [], []
    for _ in range(1500):
        counts = rng.integers(5, 15, size=40)
        sums = counts * 0.3 + rng.normal(size=40) * np.sqrt(counts)
        mean, error = mean_and_error(sums, counts)
        assert error is not None
        ratios.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_one_draw_has_no_error() -> None:
    assert mean_and_error(np.array([4.0]), np.array([2])) == (2.0, None)
    assert mean_and_error(np.array([1.0, 2.0, 3.0]), clusters=np.array([7, 7, 7])) == (2.0, None)


def test_clusters_are_summed_first() -> None:
    sums, clusters = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([9, 2, 9, 5, 2])
    s, c = by_cluster(sums, None, clusters)
    assert (s.tolist(), c.tolist()) == ([7.0, 4.0, 4.0], [2.0, 1.0, 2.0])
    assert mean_and_error(sums, clusters=clusters) == pytest.approx(mean_and_error(s, c))


def test_rows_of_a_cluster_that_agree_add_nothing() -> None:
    values = np.random.default_rng(0).normal(size=20)
    once = mean_and_error(values)
    four_times = mean_and_error(np.repeat(values, 4), clusters=np.repeat(np.arange(20), 4))
    assert four_times == pytest.approx(once)


def test_bootstrap_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.array([3.0, 1.0, 4.0, 1.0, 5.0]), np.array([2, 7, 1, 8, 2])
    monkeypatch.setattr(statistics, "_AT_ONCE", 35)  # seven draws at a time
    generator = np.random.default_rng(3)
    expected = []
    for start in range(0, 50, 7):
        for row in generator.integers(5, size=(min(7, 50 - start), 5)):
            expected.append(sum(sums[i] for i in row) / sum(counts[i] for i in row))
    assert block_bootstrap(sums, counts, draws=50, seed=3).tolist() == pytest.approx(expected)


def test_bootstrap_is_repeatable_and_bounded_in_memory() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert np.array_equal(block_bootstrap(values, draws=500, seed=4), block_bootstrap(values, draws=500, seed=4))
    assert not np.array_equal(block_bootstrap(values, draws=500, seed=4), block_bootstrap(values, draws=500, seed=5))
    blocks = 100_000
    first = next(resamples(blocks, 10_000, 0))
    assert first.size <= statistics._AT_ONCE


def test_bootstrap_spread_is_the_linearised_error() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(50, 150, size=60)
    sums = counts * rng.normal(0.3, 0.1, size=60)
    error = mean_and_error(sums, counts)[1]
    assert error is not None
    spread = block_bootstrap(sums, counts, draws=4000).std()
    assert spread == pytest.approx(error * math.sqrt(59 / 60), rel=0.05)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_by_enumeration_and_by_scipy(lost: int, won: int) -> None:
    n = lost + won
    ways = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * Fraction(ways, 2**n))))
    if n:
        assert mcnemar(lost, won) == pytest.approx(stats.binomtest(lost, n).pvalue)


def test_mcnemar_far_out() -> None:
    assert mcnemar(400, 100) == pytest.approx(stats.binomtest(100, 500).pvalue, rel=1e-6)
    assert 0 < mcnemar(400, 100) < 1e-40


@pytest.mark.parametrize(("rate", "items", "expected"), [(0.05, 1267, 0.0176), (0.05, 10_042, 0.00625)])
def test_minimum_detectable_of_known_tasks(rate: float, items: int, expected: float) -> None:
    assert minimum_detectable_flips(rate, items) == pytest.approx(expected, rel=0.01)


def test_minimum_detectable_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    for freedom in (6, 200):
        size = freedom + 1
        shift = minimum_detectable(1 / math.sqrt(size), freedom)  # for a known error, so a little optimistic
        found = stats.ttest_1samp(rng.normal(shift, 1, size=(4000, size)), 0.0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.05)
    assert minimum_detectable(1.0) == pytest.approx(2.8, abs=0.01)


def test_minimum_detectable_without_flips() -> None:
    limit = minimum_detectable_flips(0.0, 1000) * 1000
    assert stats.poisson.sf(5, limit) == pytest.approx(0.8, abs=1e-3)
    assert mcnemar(5, 0) > 0.05 > mcnemar(6, 0)
    assert minimum_detectable_flips(0.0, 3) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_smallest_level_that_rejects(p_values: list[float]) -> None:
    def rejected(level: float) -> set[int]:
        out: set[int] = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - rank) > level:
                break
            out.add(index)
        return out

    adjusted = holm(p_values)
    for level in {0.05, 0.2, *adjusted}:
        if level < 1:
            assert rejected(level) == {i for i, p in enumerate(adjusted) if p <= level}


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(FINITE, min_size=2, max_size=20), st.sampled_from([0.9, 0.95, 0.99]))
def test_student_against_scipy(values: list[float], confidence: float) -> None:
    mean, error = mean_and_error(np.array(values))
    assert error is not None
    found = t_inference(mean, error, len(values) - 1, confidence)
    if error < 1e-6:
        return
    expected = stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(confidence)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_student_says_nothing_without_an_error() -> None:
    assert t_inference(1.0, None, 3, 0.95) == (None, None, None)
    assert t_inference(1.0, 0.0, 3, 0.95) == (None, None, None)
    assert t_inference(0.0, 0.0, 3, 0.95) == (0.0, 0.0, 1.0)


def test_studentised_bootstrap_against_a_loop() -> None:
    rng = np.random.default_rng(5)
    counts = rng.integers(5, 20, size=12)
    sums = counts * rng.exponential(size=12) - 8
    found = paired_inference(sums, counts, draws=400, seed=9)
    mean, error = mean_and_error(sums, counts)
    assert error is not None
    t = []
    for row in np.random.default_rng(9).integers(12, size=(400, 12)):
        again, spread = mean_and_error(sums[row], counts[row])
        assert spread is not None
        t.append((again - mean) / spread)
    t.sort()
    assert found.low == pytest.approx(mean - t[round(0.975 * 399)] * error)
    assert found.high == pytest.approx(mean - t[round(0.025 * 399)] * error)
    extreme = sum(abs(value) >= abs(mean / error) for value in t)
    assert extreme >= 10
    assert found.p_value == pytest.approx((extreme + 1) / 401)


def test_p_beyond_what_the_draws_resolve_is_students() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.1, size=30)
    found = paired_inference(values, draws=200)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-6)
    assert found.p_value > 0


def test_many_blocks_take_the_short_way() -> None:
    values = np.random.default_rng(0).normal(0.05, 1.0, size=MOST_BLOCKS + 1)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = paired_inference(values)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("blocks", [2, 3])
def test_hardly_any_blocks(blocks: int) -> None:
    found = paired_inference(np.arange(1.0, blocks + 1), draws=500)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


@pytest.mark.parametrize("blocks", [7, 30])
def test_intervals_hold_the_truth_and_tests_keep_their_level(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    held = rejected = percentiles = 0
    for seed in range(250):
        sums = rng.normal(0.3, 1.0, size=blocks)
        found = paired_inference(sums, draws=300, seed=seed)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
        low, high = np.quantile(block_bootstrap(sums, draws=300, seed=seed), [0.025, 0.975])
        percentiles += low <= 0.3 <= high
        null = paired_inference(sums - 0.3, draws=300, seed=seed)
        assert null.p_value is not None
        rejected += null.p_value < 0.05
    assert 0.91 <= held / 250 <= 0.99
    assert rejected / 250 <= 0.09
    assert percentiles <= held


@pytest.mark.parametrize(("items", "lost", "won"), [(100, 0.02, 0.02), (300, 0.06, 0.02), (40, 0.1, 0.1)])
def test_accuracy_intervals_hold_the_truth(items: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(items, [lost, won, 1 - lost - won], size=1500)
    found = [accuracy_inference(int(row[0]), int(row[1]), items, 0.95) for row in draws]
    held = [one.low <= won - lost <= one.high for one in found if one.low is not None and one.high is not None]
    assert np.mean(held) >= 0.93
    if lost == won:
        assert np.mean([one.p_value is not None and one.p_value < 0.05 for one in found]) <= 0.05


def test_no_flips_is_no_certainty() -> None:
    found = accuracy_inference(0, 0, 50, 0.95)
    assert found.p_value == 1.0
    assert found.low == pytest.approx(-1.96 / 52, rel=1e-3)
    assert found.high == pytest.approx(1.96 / 52, rel=1e-3)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 50)), min_size=1, max_size=5))
def test_freedom_lies_between_the_smallest_and_the_sum(parts: list[tuple[float, int]]) -> None:
    freedom = freedom_of_sum([v for v, _ in parts], [f for _, f in parts])
    assert min(f for _, f in parts) - 1e-9 <= freedom <= sum(f for _, f in parts) + 1e-9


def test_freedom_of_welch() -> None:
    a, b = np.random.default_rng(0).normal(size=8), np.random.default_rng(1).normal(size=5) * 4
    expected = stats.ttest_ind(a, b, equal_var=False).df
    assert freedom_of_sum([a.var(ddof=1) / 8, b.var(ddof=1) / 5], [7, 4]) == pytest.approx(expected)
    assert freedom_of_sum([0.0, 0.0], [3, 4]) == 0.0


def test_all_samples_of_two_blocks() -> None:
    """Every bootstrap sample of two blocks is one of four."""
    found = set(np.round(block_bootstrap(np.array([1.0, 3.0]), draws=200), 9).tolist())
    assert found == {(a + b) / 2 for a, b in itertools.product([1.0, 3.0], repeat=2)}

"""Ranges and samples of inputs: the same whatever the order of batches and the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.input_samples import ChannelRanges, TokenSample
from calib.stats import Stat, StatisticsAccumulator

INPUTS = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(0))
NEEDS = frozenset({Stat.RANGES, Stat.SAMPLES})


def sample(batches: list[tuple[int, int]], limit: int = 64) -> TokenSample:
    found = TokenSample(8, torch.device("cpu"), torch.float32, limit)
    for start, stop in batches:
        found.add(INPUTS[start:stop], start)
    return found


def test_a_sample_has_distinct_tokens_of_all_sequences() -> None:
    rows = sample([(0, 2), (2, 6)]).finish()
    assert rows.shape == (64, 8)
    tokens = INPUTS.reshape(-1, 8)
    places = [int((tokens == row).all(1).nonzero()) for row in rows]
    assert len(set(places)) == 64
    assert {place // 50 for place in places} == set(range(6))
    assert places != sorted(places)


def test_samples_do_not_depend_on_batches_or_processes() -> None:
    whole = sample([(0, 6)])
    assert torch.equal(whole.finish(), sample([(4, 6), (1, 4), (0, 1)]).finish())
    first, second = sample([(0, 2), (4, 5)]), sample([(2, 4), (5, 6)])
    sent: list[list[Tensor]] = [[], []]
    for process, part in enumerate((first, second)):
        part.reduce_(lambda tensor, process=process: sent[process].append(tensor) or [tensor])  # type: ignore[misc]
    both = [list(pair) for pair in zip(*sent, strict=True)]
    joined = sample([])
    joined.reduce_(lambda tensor: both.pop(0))
    assert torch.equal(joined.finish(), whole.finish())


def test_fewer_tokens_than_the_limit_are_all_kept() -> None:
    rows = sample([(0, 1)]).finish()
    assert rows.shape == (50, 8)
    assert torch.equal(rows.sort(0).values, INPUTS[0].sort(0).values)
    assert sample([]).finish().shape == (0, 8)


def test_the_sample_is_uniform() -> None:
    many = TokenSample(1, torch.device("cpu"), torch.float32, 2000)
    places = torch.arange(40.0 * 1000).view(40, 1000, 1)
    for start in range(0, 40, 8):
        many.add(places[start : start + 8], start)
    counts = torch.histc(many.finish(), bins=20, min=0, max=40000)
    assert counts.min() > 60
    assert counts.max() < 145


def test_ranges_are_minima_and_maxima() -> None:
    ranges = ChannelRanges(8, torch.device("cpu"))
    for start in range(0, 6, 2):
        ranges.add(INPUTS[start : start + 2].bfloat16())
    ranges.add(INPUTS[:0])
    tokens = INPUTS.bfloat16().float().reshape(-1, 8)
    assert torch.equal(ranges.finish(), torch.stack([tokens.amin(0), tokens.amax(0)]))
    other = ChannelRanges(8, torch.device("cpu"))
    other.add(3 * INPUTS[:1])
    other.reduce_(lambda tensor: [tensor, ranges._bounds])
    both = torch.cat([tokens, 3 * INPUTS[0]])
    assert torch.equal(other.finish(), torch.stack([both.amin(0), both.amax(0)]))
    assert torch.equal(ChannelRanges(8, torch.device("cpu")).finish(), torch.zeros(2, 8))


def test_statistics_have_them_only_where_they_are_asked_for() -> None:
    weights = {"q": torch.randn(3, 8)}
    accumulator = StatisticsAccumulator("layer", weights, NEEDS)
    accumulator.add(INPUTS, None)
    stats = accumulator.finish().of("q")
    assert torch.equal(stats.ranges[1], INPUTS.reshape(-1, 8).amax(0))
    assert stats.samples.shape == (300, 8)
    plain = StatisticsAccumulator("layer", weights, frozenset({Stat.HESSIAN}))
    plain.add(INPUTS, None)
    assert plain.finish().samples is None

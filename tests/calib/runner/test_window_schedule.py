"""Schedules of windows: the counts of the paper, no block left out, starts that never go back, few blocks, errors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calib.errors import UsageError
from calib.runner.window_schedule import SCHEDULES, Window, describe_windows, make_windows, single_blocks, visits


def spans(windows: tuple[Window, ...]) -> list[tuple[int, ...]]:
    """The blocks of every window."""
    return [tuple(range(window.start, window.stop)) for window in windows]


def paper(blocks: int, edge: int, size: int, step: int) -> list[tuple[int, ...]]:
    """The three parts of the schedule as the paper draws them, for models that they divide evenly."""
    grows = [tuple(range(k + 1)) for k in range(edge)]
    shrinks = [tuple(range(blocks - edge + k, blocks)) for k in range(edge)]
    first, last = edge - (size - step), blocks - edge + (size - step)
    slides = [tuple(range(a, a + size)) for a in range(first, last - size + 1, step)]
    return grows + slides + shrinks


@pytest.mark.parametrize("blocks", [16, 32, 40, 48, 80])
def test_the_counts_of_the_paper(blocks: int) -> None:
    windows = make_windows("slider", blocks)
    assert spans(windows) == paper(blocks, 4, 2, 1)
    assert len(windows) == blocks + 1
    assert sum(len(window) for window in windows) == 2 * blocks + 6
    assert visits(windows) == [4, 3, *[2] * (blocks - 4), 3, 4]


@pytest.mark.parametrize("blocks", [16, 32, 40])
def test_wider_windows_visit_all_blocks_between_equally_often(blocks: int) -> None:
    assert spans(make_windows("slider", blocks, size=3)) == paper(blocks, 4, 3, 1)
    counts = visits(make_windows("slider", blocks, size=3))
    assert counts == [4, 3, *[3] * (blocks - 4), 3, 4]
    assert visits(make_windows("slider", blocks, size=4, step=2))[4:-4] == [2] * (blocks - 8)


def test_plain_windows_are_the_baseline() -> None:
    windows = make_windows("fixed", 32)
    assert spans(windows) == [(k, k + 1) for k in range(31)]
    assert sum(len(window) for window in windows) == 62
    assert spans(make_windows("fixed", 7, size=3, step=3)) == [(0, 1, 2), (3, 4, 5), (6,)]


def test_half_schedules_are_the_halves_of_the_whole() -> None:
    whole, first, last = (spans(make_windows(name, 32)) for name in ("slider", "expanding", "contracting"))
    assert first == [*whole[:-4], *spans(make_windows("fixed", 32))[28:]]
    assert last == [*spans(make_windows("fixed", 32))[:3], *whole[4:]]
    assert visits(make_windows("expanding", 32)) == [4, 3, *[2] * 29, 1]
    assert visits(make_windows("contracting", 32)) == [1, *[2] * 29, 3, 4]


SMALL = {
    1: [(0,)],
    2: [(0,), (0, 1), (1,)],
    3: [(0,), (0, 1), (1, 2), (2,)],
    4: [(0,), (0, 1), (1, 2), (2, 3), (3,)],
    8: [(0,), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7,)],
}
"""Models of up to seven blocks have an edge of one block; eight have two."""


@pytest.mark.parametrize("blocks", SMALL)
def test_few_blocks(blocks: int) -> None:
    assert spans(make_windows("slider", blocks)) == SMALL[blocks]


def test_an_edge_is_at_most_a_quarter_of_the_model() -> None:
    for blocks in range(2, 40):
        windows = spans(make_windows("slider", blocks, edge=100))
        last_at_start = [window for window in windows if window[0] == 0][-1]
        assert len(last_at_start) == max(
            blocks // 4, 2
        )  # below eight blocks the first fixed window of two starts there
    assert make_windows("slider", 12, edge=0) == make_windows("fixed", 12)


@given(st.sampled_from(SCHEDULES), st.integers(1, 90), st.integers(1, 12), st.integers(1, 12), st.integers(0, 12))
def test_every_schedule_can_be_walked(name: str, blocks: int, size: int, step: int, edge: int) -> None:
    size = min(size, blocks)
    step = min(step, size)
    windows = make_windows(name, blocks, size=size, step=step, edge=edge)
    assert windows[0].start == 0
    assert windows[-1].stop == blocks
    assert min(visits(windows)) >= 1
    assert len(visits(windows)) == blocks
    for window in windows:
        assert 0 <= window.start < window.stop <= blocks
    for one, following in itertools.pairwise(windows):
        assert one.start <= following.start <= one.stop  # never back, and nothing is jumped over
    assert len(set(windows)) == len(windows)


@given(st.integers(1, 90), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6))
def test_blocks_between_the_edges_are_visited_alike(blocks: int, step: int, repeats: int, edge: int) -> None:
    """Where the step divides the size and the windows come out even."""
    size, step = step * repeats, step
    edge_used = min(edge, max(1, blocks // 4), blocks // 2)
    overlap = size - step
    between = blocks - 2 * (edge_used - overlap)
    assume(overlap <= edge_used and between >= size and (between - size) % step == 0)
    counts = visits(make_windows("slider", blocks, size=size, step=step, edge=edge))
    assert set(counts[edge_used : blocks - edge_used]) <= {repeats}


def test_single_blocks_whatever_the_sizes_say() -> None:
    assert make_windows("single", 5, size=100, step=7) == single_blocks(5)
    assert visits(single_blocks(5)) == [1] * 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 7}, r"window of 7 blocks does not fit a model of 6: .*size is 1 to 6"),
        ({"size": 0}, r"size is 1 to 6"),
        ({"size": 2, "step": 3}, r"move by 3 leave blocks out: step is 1 to 2"),
        ({"step": 0}, r"step is 1 to 2"),
        ({"edge": -1}, r"an edge is 0 blocks or more, got -1"),
    ],
)
@pytest.mark.parametrize("name", ["slider", "expanding", "contracting", "fixed"])
def test_what_does_not_fit_is_refused(name: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_windows(name, 6, **changes)


def test_an_unknown_schedule_names_the_near_one() -> None:
    with pytest.raises(UsageError, match=r"unknown window schedule 'slide'.*'slider'"):
        make_windows("slide", 6)


def test_a_schedule_prints_itself() -> None:
    assert describe_windows(make_windows("slider", 4)) == (
        "5 windows, 8 block visits (2 to 2 a block): [0] [0-1] [1-2] [2-3] [3]"
    )
    text = describe_windows(make_windows("slider", 32))
    assert text.startswith("33 windows, 70 block visits (2 to 4 a block): [0] [0-1] [0-2] [0-3] [3-4] [4-5] [5-6] ... ")
    assert text.endswith(" [26-27] [27-28] [28-31] [29-31] [30-31] [31]")

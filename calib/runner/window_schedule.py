"""Window schedules: which consecutive blocks are worked on together, and in what order. Plain data.

    slider        [0] [0,1] [0,1,2] [0..3] | [3,4] [4,5] ... | [L-4..L-1] [L-3..L-1] [L-2,L-1] [L-1]
    expanding     the first part of it, then windows of equal size to the end
    contracting   windows of equal size from the start, then the last part of it
    fixed         windows of equal size that overlap
    single        one block after another

(SliderQuant, arXiv 2603.25284, section 3.2: progressively expanding, fixed-size and progressively contracting sliding
windows.) The first and the last ``edge`` blocks are visited more often than those between. Fixed windows reach into
the edges by ``size - step`` blocks, so that every block between is visited equally often if ``step`` divides ``size``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from calib.errors import UsageError, unknown_name

__all__ = ["SCHEDULES", "ScheduleName", "Window", "describe_windows", "make_windows", "single_blocks", "visits"]

ScheduleName = Literal["slider", "expanding", "contracting", "fixed", "single"]
SCHEDULES: tuple[ScheduleName, ...] = ("slider", "expanding", "contracting", "fixed", "single")
_BLOCKS_PER_EDGE = 4  # an edge is at most a quarter of the model, so that something is left between


@dataclasses.dataclass(frozen=True)
class Window:
    """Blocks ``start .. stop - 1``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}]" if len(self) == 1 else f"[{self.start}-{self.stop - 1}]"


def make_windows(name: str, blocks: int, *, size: int = 2, step: int = 1, edge: int = 4) -> tuple[Window, ...]:
    """The windows of a schedule, in order; starts never go back, and every block is in one.

    Args:
        name: one of `SCHEDULES`; blocks: of the model.
        size: of the fixed windows; step: from one to the next.
        edge: blocks of the expanding and of the contracting part; models of fewer than ``4 * edge`` blocks have edges
            of a quarter of their blocks, but at least one.

    Raises:
        UsageError: an unknown name; windows larger than the model, or that leave blocks out.
    """
    if name not in SCHEDULES:
        raise unknown_name("window schedule", name, SCHEDULES)
    if name == "single":
        return single_blocks(blocks)
    if blocks == 1:
        return single_blocks(1)
    _check(blocks, size, step, edge)
    edge = min(edge, max(1, blocks // _BLOCKS_PER_EDGE), blocks // 2)
    overlap = min(size - step, edge)
    expands, contracts = edge > 0 and name in ("slider", "expanding"), edge > 0 and name in ("slider", "contracting")
    shallow = [Window(0, k + 1) for k in range(edge)] if expands else []
    deep = [Window(blocks - edge + k, blocks) for k in range(edge)] if contracts else []
    start = edge - overlap if expands else 0
    stop = blocks - edge + overlap if contracts else blocks
    return (*shallow, *_fixed(start, stop, size, step), *deep)


def _fixed(start: int, stop: int, size: int, step: int) -> list[Window]:
    found = []
    while start < stop:
        found.append(Window(start, min(start + size, stop)))
        if start + size >= stop:
            break
        start += step
    return found


def _check(blocks: int, size: int, step: int, edge: int) -> None:
    if not 1 <= size <= blocks:
        raise UsageError(
            f"a window of {size} blocks does not fit a model of {blocks}: -O size is 1 to {blocks}, or say "
            f"--window-schedule single."
        )
    if not 1 <= step <= size:
        raise UsageError(f"windows of {size} blocks that move by {step} leave blocks out: step is 1 to {size}.")
    if edge < 0:
        raise UsageError(f"an edge is 0 blocks or more, got {edge}.")


def single_blocks(blocks: int) -> tuple[Window, ...]:
    """One window a block: the schedule of layer-wise methods."""
    return tuple(Window(i, i + 1) for i in range(blocks))


def visits(windows: Sequence[Window]) -> list[int]:
    """How many windows every block is in."""
    counts = [0] * max(window.stop for window in windows)
    for window in windows:
        for block in range(window.start, window.stop):
            counts[block] += 1
    return counts


def describe_windows(windows: Sequence[Window]) -> str:
    """One line for people: windows, block visits in all, and how many visits each block has."""
    counts = visits(windows)
    shown = " ".join(str(window) for window in windows)
    if len(windows) > 16:
        shown = " ".join(str(w) for w in windows[:7]) + " ... " + " ".join(str(w) for w in windows[-6:])
    return f"{len(windows)} windows, {sum(counts)} block visits ({min(counts)} to {max(counts)} a block): {shown}"

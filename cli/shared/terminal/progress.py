"""Progress of a run: a bar with the time left on a terminal, one plain line per block elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.shared.terminal.screen import Screen, visible

if TYPE_CHECKING:
    from ptq.pipeline.events import Event

__all__ = ["ProgressListener", "duration"]


def duration(seconds: float) -> str:
    """Time for people, e.g. ``"4.2 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressListener:
    """Takes the events of `ptq.quantize` and shows them; a context manager, so that the bar is always taken down.

    Args:
        screen: where to show; ``stderr`` in the command line, so that ``stdout`` is free for results.
        clock: seconds, monotonic.

    Attributes:
        found_finished: whether the result was there before, so that nothing was done.
    """

    def __init__(self, screen: Screen, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen = screen
        self._clock = clock
        self._started = clock()
        self.found_finished = False
        self._unit = "blocks"
        self._skipped = 0  # blocks that were done before this run began
        self._bar = _bar(screen) if screen.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("reading the model", total=None, layer="")

    def __enter__(self) -> ProgressListener:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A sentence above the bar, or a line."""
        self._screen.print(text, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        if event.kind in ("message", "finished"):
            self.say(event.text)
            self.found_finished |= event.kind == "finished"
        elif event.kind == "blocks":
            self._begin(event)
        elif event.kind == "layer" and self._bar is not None and self._task is not None:
            self._bar.update(self._task, layer=visible(event.name, self._screen.file))
        elif event.kind == "block_done":
            self._advance(event)

    def _begin(self, event: Event) -> None:
        self._started, self._skipped, self._unit = self._clock(), event.done, event.text or "blocks"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._unit, total=event.total, completed=event.done)
        else:
            self.say(f"{event.total} {self._unit}")

    def _advance(self, event: Event) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=event.done, layer="")
            return
        elapsed = self._clock() - self._started
        left = elapsed / max(event.done - self._skipped, 1) * (event.total - event.done)
        unit = self._unit.partition(":")[0].removesuffix("s")  # "blocks: forward pass"
        self.say(f"{unit} {event.done}/{event.total}  {duration(elapsed)} elapsed  {duration(left)} left")


def _bar(screen: Screen) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeRemainingColumn(),
        TextColumn("left "),
        TextColumn("{task.fields[layer]}", style="dim", markup=False),
        console=screen,
        speed_estimate_period=3600,  # blocks of a large model take minutes each
    )

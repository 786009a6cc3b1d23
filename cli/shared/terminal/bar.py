"""A bar with the time left for counts that are known beforehand; silent where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.shared.terminal.screen import console, visible

__all__ = ["counter_bars"]


@contextmanager
def counter_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function of (what, done, total) that moves bars on stderr, one for each ``what``."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _silent
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=screen, transient=True) as bar:
        bars = {"loading": bar.add_task("loading", total=None)}

        def step(what: str, done: int, total: int) -> None:
            if what not in bars:
                bar.update(bars["loading"], visible=False)
                bars[what] = bar.add_task(visible(what, screen.file), total=total)
            bar.update(bars[what], completed=done, total=total)

        yield step


def _silent(what: str, done: int, total: int) -> None:
    """No bar."""

"""A bar with the time left for a count that is known beforehand; silent where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.progress import console

__all__ = ["counter_bar"]


@contextmanager
def counter_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (done, total) that moves a bar on stderr for as long as the context lasts."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=screen, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _silent(done: int, total: int) -> None:
    """No bar."""

"""What a plan is doing, as events: named stretches of work with a count."""

from __future__ import annotations

from ptq.pipeline.events import Event, Listener, ignore_events

__all__ = ["Steps"]


class Steps:
    """Counts steps of one stretch of work after another.

    Args:
        listener: gets ``"blocks"`` where a stretch begins and ``"block_done"`` after every step.
    """

    def __init__(self, listener: Listener = ignore_events) -> None:
        self._listener = listener
        self._done = self._total = 0

    def begin(self, text: str, total: int) -> None:
        """A stretch begins.

        Args:
            text: what is counted, in the plural, then what is done with it: ``"blocks: forward pass"``.
            total: how many there are.
        """
        self._done, self._total = 0, total
        self._listener(Event("blocks", text, total=total))

    def __call__(self, name: str) -> None:
        """One more is done, of that name."""
        self._done += 1
        self._listener(Event("block_done", name=name, done=self._done, total=self._total))

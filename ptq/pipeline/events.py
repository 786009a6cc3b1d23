"""What `ptq.quantize` tells a caller while it works: enough for a progress bar with time left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from ptq.report import LayerRecord

__all__ = ["Event", "Listener", "ignore_events"]


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a run.

    Args:
        kind: ``"message"`` (a sentence for the log), ``"finished"`` (likewise: the result was there, nothing is done),
            ``"blocks"`` (work starts: ``total`` of what ``text`` names,
            blocks or, for learned methods, visits of blocks), ``"layer"`` (what is being done, in ``name``: a linear,
            or a step of a window), ``"layer_done"`` (``record`` is set), ``"block_done"`` (``done`` of ``total`` are
            over).
    """

    kind: Literal["message", "finished", "blocks", "layer", "layer_done", "block_done"]
    text: str = ""
    name: str = ""
    done: int = 0
    total: int = 0
    record: LayerRecord | None = None


Listener = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """The listener of a caller who does not listen."""

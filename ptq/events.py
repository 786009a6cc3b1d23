"""What `ptq.quantize` tells a caller while it works: enough for a progress bar with time left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from ptq.quantized import LayerRecord

__all__ = ["Event", "Listener"]


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a run.

    Args:
        kind: ``"message"`` (a sentence for the log), ``"blocks"`` (work starts, ``total`` blocks), ``"layer"`` (a
        linear
            is about to be done, named in ``name``), ``"layer_done"`` (``record`` is set), ``"block_done"`` (``done`` of
            ``total`` blocks are written).
    """

    kind: Literal["message", "blocks", "layer", "layer_done", "block_done"]
    text: str = ""
    name: str = ""
    done: int = 0
    total: int = 0
    record: LayerRecord | None = None


Listener = Callable[[Event], None]

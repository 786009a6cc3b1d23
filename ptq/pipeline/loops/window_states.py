"""What a learned run has stored after each window, for itself and for the next run if it is interrupted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from calib.distributed import Workers
from calib.runner.window_schedule import Window
from ptq.checkpoint.workspace import Workspace

__all__ = ["WindowStates"]

_STATE = re.compile(r"state-(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A file of the workspace with the state of a window's blocks after it."""

    name: str
    sweep: int
    window: int


class WindowStates:
    """The states in a workspace, the oldest first.

    Args:
        work: The workspace.
        windows: Of one sweep.
        workers: The processes of the run, which all see the same.
    """

    def __init__(self, work: Workspace, windows: Sequence[Window], workers: Workers) -> None:
        self._work, self._windows, self._workers = work, windows, workers
        names = workers.broadcast_object(work.names())
        stored = [_Stored(name, *map(int, found.groups())) for name in names if (found := _STATE.fullmatch(name))]
        self._stored = sorted(stored, key=lambda one: (one.sweep, one.window))

    def __len__(self) -> int:
        return len(self._stored)

    def payload(self) -> dict[str, Any]:
        """What was stored with the newest state."""
        return self._work.payload(self._stored[-1].name)

    def reached(self, sweep: int, window: int) -> bool:
        """Whether a window of a sweep has been learned."""
        return bool(self._stored) and (self._stored[-1].sweep, self._stored[-1].window) >= (sweep, window)

    def load(self, block: int, sweep: int) -> dict[str, Tensor] | None:
        """The newest state of a block that is not of a later sweep; ``None`` where there is none."""
        found = [one for one in self._stored if one.sweep <= sweep and self._holds(one, block)]
        if not found:
            return None
        prefix = f"{block}|"
        state = self._work.load(found[-1].name)
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def save(self, sweep: int, window: int, states: dict[int, dict[str, Tensor]], payload: dict[str, Any]) -> None:
        """Store what a window's blocks have learned.

        Args:
            sweep: Number of the sweep.
            window: Number of the window.
            states: Tensors by name, by block.
            payload: Plain data.
        """
        name = f"state-{sweep:02d}-{window:05d}"
        tensors = {f"{block}|{key}": value for block, state in states.items() for key, value in state.items()}
        self._work.save(name, tensors, payload)
        self._workers.broadcast_object(None)
        self._stored.append(_Stored(name, sweep, window))

    def delete_stale(self, written: Collection[int]) -> None:
        """Delete states that nobody will ask for again: of blocks that are ``written``, or stored anew."""
        kept = []
        for number, one in enumerate(self._stored):
            window, later = self._windows[one.window], self._stored[number + 1 :]
            needed = [
                block
                for block in range(window.start, window.stop)
                if block not in written and not any(self._holds(other, block) for other in later)
            ]
            if needed or number == len(self._stored) - 1:
                kept.append(one)
            else:
                self._work.drop(one.name)
        self._stored = kept

    def _holds(self, stored: _Stored, block: int) -> bool:
        window = self._windows[stored.window]
        return window.start <= block < window.stop

"""Seconds and floating-point operations of a run, and which of them belong to which part of it."""

from __future__ import annotations

import time

import torch

from calib.distributed import Workers
from calib.timing import Timing
from ptq.report import PartRecord

__all__ = ["Costs"]

_COUNTED_APART = ("passes", "statistics", "learning")  # of these every process counts only its own


class Costs:
    """The clock of one run, started when it is made.

    Attributes:
        timing: Seconds by kind of work.
        flops: Floating-point operations by kind of work.
    """

    def __init__(self) -> None:
        self.timing, self.flops = Timing(), Timing()
        self._started, self._noted = time.perf_counter(), PartRecord()

    def so_far(self) -> PartRecord:
        """Everything that was spent since the start."""
        seconds = time.perf_counter() - self._started
        return PartRecord(timing=dict(self.timing), flops=dict(self.flops), seconds=seconds)

    def note(self, part: PartRecord) -> None:
        """Note in a part what was spent since the last one: what lies between two parts belongs to the later one."""
        now, before = self.so_far(), self._noted
        part.seconds = now.seconds - before.seconds
        part.timing = {name: value - before.timing.get(name, 0.0) for name, value in now.timing.items()}
        part.flops = {name: value - before.flops.get(name, 0.0) for name, value in now.flops.items()}
        self._noted = now

    def add_flops(self, name: str, count: float) -> None:
        """Count operations of one kind of work."""
        self.flops[name] = self.flops.get(name, 0.0) + count

    def sum_flops(self, workers: Workers) -> None:
        """Passes, statistics and learning of all processes; every process has counted all solves."""
        counts = torch.tensor([self.flops.get(name, 0.0) for name in _COUNTED_APART], dtype=torch.float64)
        counts = counts.to(workers.device)
        workers.sum_(counts)
        if self.flops:
            found = zip(_COUNTED_APART, counts.tolist(), strict=True)
            self.flops.update({name: count for name, count in found if count})

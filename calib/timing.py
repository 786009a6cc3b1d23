"""Seconds, or floating-point operations, by part of the work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["Timing"]


class Timing(dict[str, float]):
    """Seconds by part of the work."""

    @contextlib.contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self[name] = self.get(name, 0.0) + time.perf_counter() - start

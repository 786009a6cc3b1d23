"""One thread for loops of small operations on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["one_thread"]

_LARGE = 1 << 20  # numbers an operation: from here on a second thread is worth waiting for


@contextlib.contextmanager
def one_thread(operand: Tensor) -> Iterator[None]:
    """Run small operations on one thread, and restore what was set.

    A column of a sweep takes microseconds. Handing half of it to another thread costs as much as it saves on a quiet
    machine, and a hundred times the whole on a busy one, where that thread has to be scheduled first. Nothing changes
    for GPU tensors and for large operands.
    """
    threads = torch.get_num_threads()
    if operand.device.type != "cpu" or operand.numel() >= _LARGE or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Loops of small operations on a GPU, recorded once and replayed as one CUDA graph.

A column of a sweep is a handful of operations of a few microseconds each; started one by one from Python they take ten
times as long to start as to run. A replayed graph has the same operations in the same order on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replayed"]


class Replayed:
    """``loop(*tensors)`` as a graph. The loop changes some of the tensors in place and must not depend on values.

    Args:
        loop: the work; example: tensors of the shapes and dtypes it will get, on a GPU (their values are not kept).
    """

    def __init__(self, loop: Callable[..., object], *example: Tensor) -> None:
        self._tensors = [torch.empty_like(tensor).copy_(tensor) for tensor in example]
        self._graph = torch.cuda.CUDAGraph()
        device = example[0].device
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            loop(*self._tensors)  # libraries set themselves up in the first call, which cannot be recorded
            self._graph.capture_begin(capture_error_mode="thread_local")  # other threads may fetch activations
            loop(*self._tensors)
            self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def fits(self, *tensors: Tensor) -> bool:
        """Whether these have the recorded shapes."""
        return [tensor.shape for tensor in tensors] == [tensor.shape for tensor in self._tensors]

    def __call__(self, *tensors: Tensor) -> None:
        """What ``loop(*tensors)`` would do."""
        for own, given in zip(self._tensors, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        for own, given in zip(self._tensors, tensors, strict=True):
            given.copy_(own)

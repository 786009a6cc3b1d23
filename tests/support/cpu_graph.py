"""What a CUDA graph does, on the CPU: the operators of a step are recorded once and repeated on the same memory.

Python runs while it is recorded and never again, so that whatever Python decided (a length, a position) is frozen.
Nothing of the recording remains: tensors that were there before get their values back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

__all__ = ["CpuGraph"]


class CpuGraph:
    """To be called in the place of the capture of a CUDA graph; counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], object], device: torch.device) -> Callable[[], None]:
        """What repeats the operators of ``step``."""
        self.captures += 1
        recording = _Recording()
        with pytest.MonkeyPatch.context() as patch, recording:
            patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # transformers asks
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            step()
        recording.restore()

        def replay() -> None:
            self.replays += 1
            for function, arguments, keywords, results in recording.calls:
                for old, new in zip(results, tree_leaves(function(*arguments, **keywords)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.own: set[int] = set()  # storages that the step made
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot be captured around .item()"
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in written:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.own:
                self.saved.setdefault(key, (tensor, tensor.clone()))
        result = func(*args, **kwargs or {})
        results = tree_leaves(result)
        before = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in results:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.own.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs or {}, results))
        return result

    def restore(self) -> None:
        for tensor, value in self.saved.values():
            tensor.copy_(value)

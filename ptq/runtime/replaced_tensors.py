"""Stored tensors of a layer that a kernel holds in an order of its own: in memory once, and there again when read.

A kernel that repacks a weight (`Kernel.prepare`) and can give the checkpoint's tensors back (`Kernel.restore`) makes
them redundant: after the first product the layer lets go of them. Whoever reads or sets one (``state_dict``, ``.to()``,
a copy, the reference, an attribute) finds them restored, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

__all__ = ["ReplaceableTensors"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplaceableTensors(nn.Module):
    """A module some of whose buffers can be gone, because it can make them again."""

    _gone: frozenset[str] = frozenset()
    bytes_gone = 0
    """Of the buffers that are gone; what replaces them takes about as many."""

    def remade_tensors(self) -> Mapping[str, Tensor]:
        """Buffers that the module can do without, made from what it keeps."""
        raise NotImplementedError

    def after_restoring(self) -> None:
        """Called when buffers that were gone are there again."""
        raise NotImplementedError

    def drop_tensors(self) -> bool:
        """Let go of the buffers that `remade_tensors` gives, if it gives exactly what they are.

        Returns:
            Whether they are gone.
        """
        buffers, made = self.__dict__["_buffers"], self.remade_tensors()
        if not all(_same_bits(tensor, buffers[name]) for name, tensor in made.items()):
            return False
        for name in made:
            buffers[name] = None
        self._gone, self.bytes_gone = frozenset(made), sum(tensor.nbytes for tensor in made.values())
        return True

    def restore_tensors(self) -> None:
        """Put the buffers back; nothing happens where they are."""
        if self._gone:
            with torch.inference_mode(False), torch.no_grad():
                self.__dict__["_buffers"].update(self.remade_tensors())
            self._gone, self.bytes_gone = frozenset(), 0
            self.after_restoring()

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        """Those of ``nn.Module``, all of them there: `state_dict`, `named_buffers` and `_apply` read them here.

        While ``torch.compile`` traces a module it lists its buffers without reading them: those that are gone stay so.
        """
        if self._gone and TracingContext.try_get() is None:
            self.restore_tensors()
        buffers: dict[str, Tensor | None] = self.__dict__["_buffers"]
        return buffers

    @_buffers.setter
    def _buffers(self, value: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = value

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            self.restore_tensors()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._gone:
            self.restore_tensors()
        super().__setattr__(name, value)


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors have one dtype, shape and place, and the same bits: NaN equals itself, and 0 is not -0."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a.contiguous().view(_BITS[a.itemsize]), b.contiguous().view(_BITS[b.itemsize]))

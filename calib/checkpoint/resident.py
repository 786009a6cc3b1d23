"""A model whose weights stay in memory: loading and releasing blocks does nothing any more."""

from __future__ import annotations

from typing import Any

from calib.checkpoint.reader import ModelSource

__all__ = ["ResidentSource"]


class ResidentSource:
    """A `calib.checkpoint.reader.ModelSource` with all weights loaded; everything else is the source's.

    Args:
        source: the model.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        source.load(source.tensor_names())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def load(self, names: frozenset[str]) -> None:
        """Nothing: the weights are there."""

    def release(self, names: frozenset[str]) -> None:
        """Nothing: the weights stay."""

    def close(self) -> None:
        """Give the weights' memory back."""
        self._source.release(self._source.tensor_names())

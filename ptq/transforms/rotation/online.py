"""The online rotation of the residual stream: what keeps a head tied to its embedding in a rotated model.

Blocks of a rotated model work on ``Q h`` instead of ``h``. Merged into the checkpoint, ``Q`` and the gain of the last
norm make two tensors of one that embedding and head shared. Applied online, the embedding, the last norm and the head
stay as they were:

    embedding -> Q h -> blocks, rotated -> Q^T h -> last norm -> head

The price is two products with ``Q`` a token, of ``n log n`` operations each, and no byte of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq.errors import NumericalError, OutputError
from ptq.transforms.hadamard import ResidualRotation

__all__ = ["StreamRotation"]

_ROWS = 1 << 12  # of the head in float64 at a time


@dataclasses.dataclass(frozen=True)
class StreamRotation:
    """Where a model rotates its residual stream at run time, and by which rotation.

    Args:
        seed: Of `ResidualRotation`.
        keep_ones: As there.
        embeddings: Names of the modules whose outputs, added up, enter the first block; they are rotated.
        norm: Name of the last norm; what it reads is rotated back.
        offset: Its gain is ``weight + offset``; only merging asks.
    """

    seed: int
    keep_ones: bool
    embeddings: tuple[str, ...]
    norm: str
    offset: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a checkpoint's config holds it."""
        return {**dataclasses.asdict(self), "embeddings": list(self.embeddings)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StreamRotation:
        """The inverse of `to_dict`.

        Raises:
            KeyError: A field is missing.
            TypeError: A field is of another type.
        """
        found = cls(fields["seed"], fields["keep_ones"], tuple(fields["embeddings"]), fields["norm"], fields["offset"])
        names = (*found.embeddings, found.norm)
        if type(found.seed) is not int or type(found.keep_ones) is not bool or type(found.offset) is not float:
            raise TypeError("seed is a whole number, keep_ones true or false, offset a number")
        if not found.embeddings or isinstance(fields["embeddings"], str) or not all(type(n) is str for n in names):
            raise TypeError("embeddings is a list of names, norm a name")
        return found

    def inside(self, prefix: str) -> StreamRotation:
        """The same in a submodule, whose names do without ``prefix``."""
        names = tuple(name.removeprefix(prefix) for name in self.embeddings)
        return dataclasses.replace(self, embeddings=names, norm=self.norm.removeprefix(prefix))

    def merged_rows(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """Rows ``[rows, width]`` of an embedding, or of the head with the last norm's gain, of a model that rotates
        nothing at run time; in their dtype."""
        rotation = self._rotation(rows)
        merged = torch.empty_like(rows)
        for start in range(0, len(rows), _ROWS):
            piece = rows[start : start + _ROWS].double()
            merged[start : start + _ROWS] = rotation(piece if gain is None else piece * gain)
        return merged

    def gain(self, norm: Mapping[str, Tensor]) -> Tensor:
        """The last norm's factor for every channel, float64 ``[width]``, from its tensors."""
        return norm["weight"].double() + self.offset

    def merged_norm(self, norm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The last norm of a model that rotates nothing at run time.

        Args:
            norm: Its ``weight`` and perhaps ``bias``, ``[width]``.

        Raises:
            NumericalError: A channel has a bias and no gain.
        """
        merged = {"weight": torch.full_like(norm["weight"], 1.0 - self.offset)}
        if "bias" in norm:
            shift = (norm["bias"].double() / self.gain(norm)).nan_to_num(0.0, math.inf, -math.inf)
            if not shift.isfinite().all():
                raise NumericalError(f"{self.norm} has a bias where its gain is 0: its rotation cannot be merged.")
            merged["bias"] = self._rotation(shift)(shift).to(norm["bias"].dtype)
        return merged

    def _rotation(self, x: Tensor) -> ResidualRotation:
        return ResidualRotation(x.shape[-1], self.seed, keep_ones=self.keep_ones)

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Make a model rotate its stream, through hooks on its own modules.

        Args:
            model: With rotated blocks; everything else as it was.

        Returns:
            Handles that take the hooks away again.

        Raises:
            OutputError: The model has no module of such a name.
        """
        modules = dict(model.named_modules())
        missing = [name for name in (*self.embeddings, self.norm) if name not in modules]
        if missing:
            raise OutputError(
                f"the checkpoint's config says that the residual stream is rotated at {missing[0]}, but "
                f"{type(model).__name__} has no such module."
            )
        rotations: dict[int, ResidualRotation] = {}

        def rotation(x: Tensor) -> ResidualRotation:
            width = x.shape[-1]
            if width not in rotations:
                rotations[width] = self._rotation(x)
            return rotations[width]

        def enter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return rotation(output).online(output)

        def leave(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (rotation(args[0]).online(args[0], inverse=True), *args[1:]), kwargs
            key = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return args, {**kwargs, key: rotation(kwargs[key]).online(kwargs[key], inverse=True)}

        found = [modules[name].register_forward_hook(enter) for name in self.embeddings]
        return [*found, modules[self.norm].register_forward_pre_hook(leave, with_kwargs=True)]

"""transformers' side of ``transform_config``: its config class drops the field, ours keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.quantization_config import CompressedTensorsConfig as StockConfig

from ptq.scheme import Rotation
from ptq.transforms.hadamard import InputRotation

__all__ = ["CompressedTensorsConfig", "install_rotations"]


class CompressedTensorsConfig(StockConfig):
    """The stock config with ``transform_config`` as it is stored, which is saved again as well.

    It has the stock class's name: transformers compares it with that of what users pass to `from_pretrained`.
    """

    def __init__(self, *args: Any, transform_config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stored_transforms = dict(transform_config or {})

    def to_dict(self) -> dict[str, Any]:
        """See the stock class."""
        stock: dict[str, Any] = super().to_dict()
        return stock | ({"transform_config": self.stored_transforms} if self.stored_transforms else {})


def install_rotations(model: nn.Module, rotations: Mapping[str, Rotation]) -> None:
    """Make plain linears rotate what they read, through hooks.

    Args:
        model: With the linears.
        rotations: By full name.
    """
    for name, rotation in rotations.items():
        module = model.get_submodule(name)
        with torch.device("cpu"):  # models are built on the meta device
            made = InputRotation.of(rotation, module.in_features)  # type: ignore[arg-type]

        def rotate(_: nn.Module, args: tuple[Tensor, ...], made: InputRotation = made) -> tuple[Tensor, ...]:
            return (made(args[0]), *args[1:])

        module.register_forward_pre_hook(rotate)

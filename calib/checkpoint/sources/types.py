"""`ModelSource`: what every source of a model's tensors offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calib.checkpoint.files import CompanionRule
from calib.checkpoint.quantized import SourceQuantization
from calib.checkpoint.safetensors_header import StoredTensor

__all__ = ["ModelSource"]


class ModelSource(Protocol):
    """A model whose parts are loaded when they are needed."""

    skeleton: PreTrainedModel
    name: str
    dtype: torch.dtype
    quantization: SourceQuantization | None
    """Of a checkpoint that was quantized already and is dequantized as it is read."""

    @property
    def folder(self) -> Path | None:
        """The folder of the checkpoint; ``None`` for a model in memory."""
        ...

    @property
    def companions(self) -> CompanionRule:
        """What may go along from ``folder`` beside the weights."""
        ...

    def stored_config(self) -> dict[str, Any]:
        """What ``config.json`` of these tensors says, as plain data, without ``config_changes``."""
        ...

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """What the config of a model of these tensors says otherwise than the stored one (after a transform)."""
        ...

    def tensor_names(self) -> frozenset[str]:
        """Full names of the parameters and buffers that the checkpoint has, without second names of tied ones."""
        ...

    def load(self, names: frozenset[str]) -> None:
        """Fill these parameters of the skeleton, on the CPU in the checkpoint's dtype; the caller may change them."""
        ...

    def release(self, names: frozenset[str]) -> None:
        """Give the memory of these parameters back."""
        ...

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors that these parameters are made of: ``(name to write it under, parameter, tensor)``.

        They are the checkpoint's, with their names there, except where only some parameters of a layer's experts are
        asked for: those are cut out of the fused tensor one by one, under their names in the split model and in the
        model's dtype. Ask for all that passes through a layer at once.
        """
        ...

    def unused(self) -> list[str]:
        """Names of tensors in the checkpoint that are no part of the model, and are left out."""
        ...

    def carried(self) -> dict[str, StoredTensor]:
        """Tensors of the checkpoint that are no part of the model, and go along: those of a multimodal checkpoint."""
        ...

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """What `raw_tensors` would give, without reading it: ``(parameter, shape, bytes)``."""
        ...

    def fingerprint(self) -> str:
        """Identifies the weights: a hash over config, names, shapes and samples of every tensor."""
        ...

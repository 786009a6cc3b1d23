"""`TextPart`: the language model inside a multimodal checkpoint as a model of its own.

The text model is transformers' causal language model of the text config. It takes over the very modules of the whole
model, so that what is loaded into the one is in the other, and only names are translated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from calib.checkpoint.files import CompanionRule
from calib.checkpoint.quantized import SourceQuantization
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError
from calib.model.model_class import language_model, text_config

__all__ = ["TextPart", "WholeSource", "text_parameters"]


class WholeSource(Protocol):
    """What is needed of the source of the whole model (`calib.checkpoint.reader`)."""

    skeleton: PreTrainedModel
    name: str
    dtype: torch.dtype
    quantization: SourceQuantization | None

    @property
    def folder(self) -> Path | None: ...
    @property
    def companions(self) -> CompanionRule: ...
    def tensor_names(self) -> frozenset[str]: ...
    def fill(self, names: frozenset[str]) -> None: ...
    def release(self, names: frozenset[str]) -> None: ...
    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]: ...
    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]: ...
    def model_key(self, key: str) -> str: ...
    def fingerprint(self) -> str: ...


class TextPart:
    """A `ModelSource` of the text model alone.

    Args:
        whole: the multimodal model; it must not be used any more.

    Raises:
        ModelError: transformers has no causal language model for the text config, or one that is built otherwise.
    """

    def __init__(self, whole: WholeSource) -> None:
        self._whole = whole
        self.name, self.dtype, self.quantization = whole.name, whole.dtype, whole.quantization
        self.config_changes: Mapping[str, Any] = {}
        whole.skeleton.tie_weights()
        self.skeleton: PreTrainedModel = _text_model(whole.skeleton, whole.dtype)
        self.skeleton.tie_weights()
        names = {id(module): name for name, module in whole.skeleton.named_modules()}
        shared = {name: names[id(module)] for name, module in self.skeleton.named_modules() if id(module) in names}
        self._to_whole = shared
        self._to_text = {there: here for here, there in shared.items()}

    @property
    def folder(self) -> Path | None:
        return self._whole.folder

    @property
    def companions(self) -> CompanionRule:
        return CompanionRule(code=self._whole.companions.code, text_only=True)

    def stored_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.skeleton.config.to_json_string())
        config["architectures"] = [type(self.skeleton).__name__]
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        head: Any = self.skeleton.get_output_embeddings()  # type: ignore[no-untyped-call]
        config["tie_word_embeddings"] = head.weight is self.skeleton.get_input_embeddings().weight
        return config

    def tensor_names(self) -> frozenset[str]:
        found = (_translated(name, self._to_text) for name in self._whole.tensor_names())
        return frozenset(name for name in found if name is not None)

    def load(self, names: frozenset[str]) -> None:
        self._whole.fill(self._whole_names(names))
        self.skeleton.tie_weights()

    def release(self, names: frozenset[str]) -> None:
        self._whole.release(self._whole_names(names))

    def raw_tensors(self, names: frozenset[str]) -> Iterator[tuple[str, str, Tensor]]:
        for key, parameter, tensor in self._whole.raw_tensors(self._whole_names(names)):
            yield self._text_name(self._whole.model_key(key)), self._text_name(parameter), tensor

    def stored_sizes(self, names: frozenset[str]) -> Iterator[tuple[str, tuple[int, ...], int]]:
        for parameter, shape, size in self._whole.stored_sizes(self._whole_names(names)):
            yield self._text_name(parameter), shape, size

    def unused(self) -> list[str]:
        return []

    def carried(self) -> dict[str, StoredTensor]:
        return {}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._whole.fingerprint()} text only".encode()).hexdigest()

    def _whole_names(self, names: Iterable[str]) -> frozenset[str]:
        found = (_translated(name, self._to_whole) for name in names)
        return frozenset(name for name in found if name is not None)

    def _text_name(self, name: str) -> str:
        found = _translated(name, self._to_text)
        if found is None:
            raise ModelError(f"{name} is no tensor of {type(self.skeleton).__name__}: leave out --text-only.")
        return found


def _text_model(whole: PreTrainedModel, dtype: torch.dtype) -> Any:
    """The causal language model of the text config, with the modules of ``whole``."""
    config, decoder = text_config(whole.config), language_model(whole)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise ModelError(
            f"transformers has no causal language model for {type(config).__name__}, the text part of "
            f"{type(whole).__name__}: leave out --text-only, the whole model is written then."
        )
    if isinstance(decoder, found):
        return decoder
    head: Any = whole.get_output_embeddings()  # type: ignore[no-untyped-call]
    config.tie_word_embeddings = head is not None and head.weight is whole.get_input_embeddings().weight
    with init_empty_weights(include_buffers=False):
        model = found._from_config(config, dtype=dtype)
    if head is None or type(model.base_model) is not type(decoder):
        raise ModelError(
            f"the text part of {type(whole).__name__} is a {type(decoder).__name__}, and {found.__name__} has a "
            f"{type(model.base_model).__name__}: leave out --text-only, the whole model is written then."
        )
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(head)
    return model.eval()


def _translated(name: str, modules: Mapping[str, str]) -> str | None:
    """A tensor's name with the longest known module in front replaced; ``None`` if there is none but the model."""
    module: str = name
    while module:
        module, _, _ = module.rpartition(".")
        if module and module in modules:
            there = modules[module]
            return f"{there}.{name[len(module) + 1 :]}" if there else name[len(module) + 1 :]
    return None


def text_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters that the text part of a model has."""
    parts = {id(module) for module in language_model(model).modules()}
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = (name for name, module in model.named_modules() if id(module) in parts or module is head)
    modules = {name: model.get_submodule(name) for name in found}
    return frozenset(
        f"{name}.{leaf}" if name else leaf
        for name, module in modules.items()
        for leaf, _ in module.named_parameters(recurse=False)
    )

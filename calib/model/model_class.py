"""Which class a model folder is built and loaded as, and which parts of a model serve other input than text.

A folder whose config holds a text config (a multimodal checkpoint) is built as the class that its config names, with
everything in it; any other folder as the causal language model of its config. There is no table of names here: the
classes, and which config belongs to which, are transformers' own.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

__all__ = [
    "AUTO_CLASSES",
    "find_model_class",
    "is_multimodal",
    "language_model",
    "other_modalities",
    "text_config",
    "text_model",
]

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Entries of ``auto_map`` under which a model's own code is looked for, in this order."""


def find_model_class(config: Any, *, trust_remote_code: bool = False) -> Any | None:
    """The class whose ``from_pretrained`` gives the whole model of a config, as a language model.

    Args:
        config: the model's config.
        trust_remote_code: whether classes that come with the model may be used.

    Returns:
        A model class or an auto class; ``None`` where the config is not that of a decoder-only language model.
    """
    own = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for auto in AUTO_CLASSES:
            if auto.__name__ in own:
                return auto
    if getattr(config, "is_encoder_decoder", False):
        return None
    composite = text_config(config) is not config
    named = _named_class(config) if composite else None
    if named is not None:
        return named
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM if composite and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else None


def text_config(config: Any) -> Any:
    """The config of the part that reads and writes text; ``config`` itself where there is no other."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # a config of the model's own, or one with several text configs
        return config


def is_multimodal(model: nn.Module) -> bool:
    """Whether a model holds a language model with a config of its own."""
    config = getattr(model, "config", None)
    return config is not None and text_config(config) is not config


def language_model(model: nn.Module) -> nn.Module:
    """The decoder inside a multimodal model, as the model itself names it; ``model`` where it names none."""
    try:
        decoder = model.get_decoder()  # type: ignore[operator]
    except (AttributeError, TypeError, NotImplementedError):
        return model
    return decoder if isinstance(decoder, nn.Module) else model


def text_model(model: Any) -> Any:
    """The language model inside a multimodal one, where it has a head of its own (Llama 4); else ``model``."""
    decoder = language_model(model)
    headed = isinstance(decoder, PreTrainedModel) and decoder.can_generate()
    return decoder if headed and is_multimodal(model) else model


def other_modalities(model: nn.Module) -> list[str]:
    """Names of the sub-models that serve other input than text: vision towers, audio encoders.

    They are models whose config is neither that of the whole nor that of its text part.
    """
    config = getattr(model, "config", None)
    text = text_config(config)
    if config is None or text is config:
        return []
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and name and not name.startswith(tuple(f"{one}." for one in found)):
            inner = (part.config for part in module.modules() if isinstance(part, PreTrainedModel))
            if not {type(config), type(text)} & {type(one) for one in inner}:
                found.append(name)
    return found


def _named_class(config: Any) -> Any | None:
    """The class of transformers that ``architectures`` names, if it generates text and is one of this config."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            continue
        if found.config_class is type(config) and found.can_generate():
            return found
    return None

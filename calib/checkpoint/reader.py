"""Models opened without loading them: config and tensor index first, weights block by block.

`open_model` gives a `ModelSource`. Its ``skeleton`` is the Hugging Face model with parameters on the meta device
(buffers such as rotary frequencies are real); ``load`` fills some of the parameters through transformers' own key
conversions, ``release`` empties them again. Tensors that are not quantized are handed out under their original names
and bytes (`raw_tensors`), so that they pass through a quantization unchanged.

Experts that transformers keeps in one tensor are split (`calib.model.experts`): the skeleton and all names here are
those of one linear an expert, whatever the checkpoint holds.

Three kinds of model: a folder or hub id with safetensors (lazy), a ``.gguf`` file (dequantized by transformers on
opening) and a module in memory (copied block by block, never changed).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from calib.checkpoint.config import check_config
from calib.checkpoint.files import resolve_model, stored_tensors
from calib.checkpoint.gguf_model import check_gguf_model
from calib.checkpoint.quantized import open_weights
from calib.checkpoint.safetensors_header import StoredTensor
from calib.checkpoint.sources.folder import FolderSource
from calib.checkpoint.sources.module import ModuleSource
from calib.checkpoint.sources.skeleton import quiet_transformers
from calib.checkpoint.sources.text_part import TextPart
from calib.checkpoint.sources.types import ModelSource
from calib.errors import ModelError
from calib.model.experts import expert_lists
from calib.model.model_class import find_model_class, is_multimodal

__all__ = ["FolderSource", "ModelSource", "ModuleSource", "open_model", "quiet_transformers", "unmerged_experts"]


def open_model(
    model: str | Path | nn.Module, *, trust_remote_code: bool = False, text_only: bool = False
) -> ModelSource:
    """Open a model without loading its weights.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or a module in memory.
        trust_remote_code: run modelling code that ships with the model.
        text_only: of a multimodal model, open the text part as a model of its own.

    Raises:
        ModelError: no weights, pickle files only, not a causal language model, a quantization that is not read,
            damaged files.
    """
    if isinstance(model, nn.Module):
        held = ModuleSource(model, getattr(model, "name_or_path", "") or type(model).__name__)
        return TextPart(held) if text_only and is_multimodal(held.skeleton) else held
    if str(model).endswith(".gguf"):
        return _open_gguf(Path(model))
    folder = resolve_model(str(model))
    stored = stored_tensors(folder)
    config = read_config(folder, trust_remote_code, stored)
    weights = open_weights(folder, stored, config)
    source = FolderSource(folder, str(model), config, trust_remote_code, weights, text_only)
    return TextPart(source) if text_only and is_multimodal(source.skeleton) else source


def read_config(folder: Path, trust_remote_code: bool = False, stored: Mapping[str, StoredTensor] | None = None) -> Any:
    """The model's config, checked to be that of a causal language model.

    Raises:
        ModelError: there is none, it cannot be read, or it is not one we quantize.
    """
    check_config(folder, trust_remote_code=trust_remote_code, stored=stored)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        config._attn_implementation = config._experts_implementation = None  # ours to choose, not the file's
    except Exception as error:  # config classes raise errors of many unrelated kinds
        raise ModelError(f"cannot read the config of {folder}: {type(error).__name__}: {error}") from error
    classes = config.architectures or []
    # transformers has causal heads for encoders such as BERT, and would put weights trained without a mask behind them.
    encoder = getattr(config, "is_decoder", None) is False and bool(classes)
    encoder = encoder and not any("CausalLM" in name or "LMHead" in name for name in classes)
    if config.is_encoder_decoder or encoder or find_model_class(config, trust_remote_code=trust_remote_code) is None:
        raise ModelError(
            f"{folder} is a {config.model_type} model, which is not a decoder-only causal language model; "
            f"ptq quantizes those."
        )
    return config


def _open_gguf(file: Path) -> ModuleSource:
    """Dequantized to bfloat16 by transformers; the whole model is in memory."""
    check_gguf_model(file)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain: Any = type(model)(config)
    plain = plain.to(torch.bfloat16)
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    return ModuleSource(plain, str(file))


def unmerged_experts(model: nn.Module) -> str | None:
    """An expert's linear whose ``weight`` a transformers that does not split experts would not find by its name here.

    Args:
        model: the split skeleton.
    """
    lists = expert_lists(model)
    conversions: list[Any] = get_model_conversion_mapping(model) if lists else []  # type: ignore[arg-type]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    for name, experts in lists.items():
        for parameter, linears in experts.layout.parameters.items():
            for linear in linears if not parameter.endswith("_bias") else ():
                found, _ = rename_source_key(f"{name}.0.{linear}.weight", renamings, converters)
                if found != f"{name}.{parameter}":
                    return f"{name}.0.{linear}"
    return None

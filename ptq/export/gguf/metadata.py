"""What llama.cpp reads of a model's architecture, by family, from the config of transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

from ptq.errors import UsageError
from ptq.export.gguf.experts import add_experts

__all__ = ["FAMILIES", "Family", "add_architecture", "find_family", "rope_factors"]


@dataclasses.dataclass(frozen=True)
class Family:
    """How llama.cpp has a family otherwise than transformers.

    Args:
        arch: llama.cpp's name of the architecture.
        permutes: rows of q and k are in the order of another way to rotate positions.
        adds_one: the weights of norms are stored with the 1 that the model adds to them.
        layer_norm: the model has LayerNorm with bias and not RMSNorm.
        tensor_scales: llama.cpp multiplies the output of every linear by a number of its own, where the file has one.
        normalizes_experts: llama.cpp makes the weights of the chosen experts sum to 1; ``None`` for families without
            experts.
    """

    arch: MODEL_ARCH
    permutes: bool = False
    adds_one: bool = False
    layer_norm: bool = False
    tensor_scales: bool = False
    normalizes_experts: bool | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, permutes=True, tensor_scales=True),
    "mistral": Family(MODEL_ARCH.LLAMA, permutes=True, tensor_scales=True),
    "mixtral": Family(MODEL_ARCH.LLAMA, permutes=True, tensor_scales=True, normalizes_experts=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, normalizes_experts=False),
    "qwen3": Family(MODEL_ARCH.QWEN3, tensor_scales=True),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, tensor_scales=True, normalizes_experts=True),
    "gemma2": Family(MODEL_ARCH.GEMMA2, adds_one=True),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, adds_one=True),
    "phi": Family(MODEL_ARCH.PHI2, layer_norm=True),
}
"""By ``model_type``."""
_PERIODS = {MODEL_ARCH.GEMMA2: 2, MODEL_ARCH.GEMMA3: 6}
"""Which blocks llama.cpp runs without a window."""


def find_family(model_type: str, *, dense: bool = True) -> Family:
    """The family of a model.

    Args:
        model_type: of its config.
        dense: whether a dequantized folder of it can be written.

    Raises:
        UsageError: none that is written; says what to do.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        instead = (
            "Write a dequantized folder (--format f16), and convert it with convert_hf_to_gguf.py of llama.cpp."
            if dense
            else "Dequantized folders of it cannot be written either: convert the model in full precision with "
            "convert_hf_to_gguf.py of llama.cpp and quantize it there, or load this result with ptq.load."
        )
        raise UsageError(f"ptq writes GGUF files of {', '.join(FAMILIES)}, and this is a {model_type} model. {instead}")
    return family


def add_architecture(writer: GGUFWriter, config: Any, family: Family) -> None:
    """Add the sizes and constants of a model.

    Args:
        writer: of the file.
        config: the text config of transformers.
        family: of the model.

    Raises:
        UsageError: positions that are scaled in a way that is not written.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if family.layer_norm:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None) is not None:
            add(getattr(config, name))
    if family.normalizes_experts is not None:
        add_experts(writer, config, normalized=family.normalizes_experts)
    _add_window(writer, config, family)
    _add_positions(writer, config, head_dim)


def _add_window(writer: GGUFWriter, config: Any, family: Family) -> None:
    """The sliding window, of architectures that llama.cpp runs with one; others run in full."""
    window = getattr(config, "sliding_window", None)
    if window is None or family.arch not in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        return
    kinds, period = getattr(config, "layer_types", None) or [], _PERIODS.get(family.arch)
    full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    if period is not None and full != list(range(period - 1, len(kinds), period)):
        raise UsageError(
            f"llama.cpp runs every {period}th block of this architecture with full attention, and this model has it in "
            f"the blocks {full}: write a dequantized folder (--format f16)."
        )
    writer.add_sliding_window(window)


def _add_positions(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    rope = rope_parameters(config)
    rotated = int(head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if isinstance(local, Mapping):
        writer.add_rope_freq_base_swa(float(local.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise UsageError(
            f"positions are scaled as {kind!r}, which ptq does not write to GGUF: write a dequantized folder (--format "
            "f16), and convert it with convert_hf_to_gguf.py of llama.cpp."
        )


def rope_parameters(config: Any) -> dict[str, Any]:
    """Parameters of positions, of full attention where there are several kinds."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get("full_attention", found))


def rope_factors(config: Any) -> Tensor | None:
    """What every frequency is divided by in Llama 3.1 and later; ``None`` for models without it."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    long = torch.where(wavelength > context / low, torch.full_like(between, float(factor)), between)
    return torch.where(wavelength < context / high, torch.ones_like(between), long)

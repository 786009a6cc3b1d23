"""The config of a small model with the structure of a large one.

Depth is cut to a prefix of the blocks that has one of every kind, so that all names stay what they are; widths and
numbers of experts become small. There is no table of architectures: keys are known by the names that configs share,
and whoever uses the result compares the structures of the two models (`ptq.proof.skeleton`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["shrink_config"]

HEADS, HEAD, HIDDEN, INNER, VOCABULARY, EXPERTS = 4, 16, 64, 128, 512, 4

_DEPTH = re.compile(r"(^|_)(n_|num_|hidden_)*(layers?|blocks?|depth)($|_)")
_SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "embed_dim"), HIDDEN
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("inner_dim", "intermediate_size_mlp", "dense_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_intermediate_size",), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "rotary_dim", "v_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank", "global_head_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "swa_v_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "time_step_rank", "mamba_dt_rank"), 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 16),
}
"""What widths become at most, by name."""
_KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
)
_STATE_HEADS = {"num_heads": "head_dim", "mamba_n_heads": "mamba_d_head", "mamba_num_heads": "mamba_head_dim"}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_ROTARY = ("rope_parameters", "rope_scaling")


def shrink_config(config: Mapping[str, Any], blocks: int, kept: int, *, widths: bool = True) -> dict[str, Any]:
    """A smaller config.

    Args:
        config: of the model, all values filled in (``to_dict``); not changed.
        blocks: how many the model has.
        kept: how many of them, from the first on, the small model shall have.
        widths: also make widths, heads, experts and the vocabulary small.
    """
    small = _walk(copy.deepcopy(dict(config)), lambda key, value: _cut_depth(key, value, blocks, kept))
    return _shrink_widths(small) if widths else small


def _walk(data: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The config with every entry changed, those of configs inside it too."""
    return {
        key: _walk(value, change) if _is_config(value) and key not in _ROTARY else change(key, value)
        for key, value in data.items()
    }


def _is_config(value: Any) -> bool:
    """Whether a value holds entries by name; labels, for one, are numbered."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _cut_depth(key: str, value: Any, blocks: int, kept: int) -> Any:
    if isinstance(value, list) and len(value) == blocks:
        return value[:kept]
    depth = type(value) is int and value == blocks and _DEPTH.search(key) is not None
    return kept if depth else value


def _shrink_widths(config: dict[str, Any]) -> dict[str, Any]:
    """The widths of a config and of those inside it."""
    small: dict[str, Any] = {
        key: _shrink_widths(value) if _is_config(value) else value for key, value in config.items()
    }
    for key, size in _SMALL.items():
        if type(small.get(key)) is int and small[key] > size:
            small[key] = size
    for key in _KEY_HEADS:
        if type(small.get(key)) is int:
            heads = next((config[name] for name in ("num_attention_heads", "n_head") if name in config), None)
            small[key] = HEADS if small[key] == heads else min(small[key], 2)
    for heads, width in _STATE_HEADS.items():
        expand = config.get("mamba_expand", config.get("expand"))
        if expand is not None and type(small.get(heads)) is int and type(config.get(width)) is int:
            small[width] = min(config[width], HEAD)
            small[heads] = int(expand) * HIDDEN // small[width]
    for key in _POSITIONS:
        if type(small.get(key)) is int:
            small[key] = min(small[key], 512)
    for key, value in small.items():
        if str(key).endswith("_token_id"):  # labels of a config have numbers as keys
            small[key] = _in_vocabulary(value)
        if key in _ROTARY and isinstance(value, dict):
            small[key] = _shrink_rotary(value, config)
    return small


def _in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_vocabulary(one) for one in value]
    return VOCABULARY - 1 if type(value) is int and value >= VOCABULARY else value


def _shrink_rotary(rotary: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings for heads of `HEAD` channels: lists have an entry for every pair of channels, or add up to it."""
    heads = config.get("num_attention_heads") or config.get("n_head")
    hidden = config.get("hidden_size") or config.get("n_embd")
    head = config.get("head_dim") or (hidden // heads if hidden and heads else HEAD)
    small: dict[str, Any] = {}
    for key, value in rotary.items():
        if isinstance(value, dict):
            small[key] = _shrink_rotary(value, config)
        elif isinstance(value, list) and key == "mrope_section":
            small[key] = [max(1, size * HEAD // head) for size in value]
        elif isinstance(value, list):
            small[key] = value[: max(1, len(value) * HEAD // head)]
        else:
            small[key] = value
    return small

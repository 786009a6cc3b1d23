"""Tiny random models of many families: two to four blocks, hidden size 64, what makes each different."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},  # biases on q, k, v
    "qwen3": {"head_dim": 16},  # norms on q and k
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},  # soft-capping, extra norms
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},  # two rotary tables
    "phi3": {"rope_scaling": None},  # fused qkv and gate/up
    "phi": {},  # parallel attention and MLP, biases
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 96},  # Conv1D, tied head
    "gpt_neox": {"rotary_pct": 0.25},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    "olmo2": {},
    "stablelm": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen2_moe": {  # a shared expert with a gate of its own
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
    "deepseek_v3": {  # low-rank attention, a dense first block, routing by groups with a bias
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
    "gpt_oss": {  # experts transposed, with biases, gate and up in alternate rows, a gating of its own
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
ODD_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {  # keys and values shared between blocks, inputs of its own for every block
        "head_dim": 16,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 400,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},  # a router inside the gate
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 96},
    "mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},  # a weight read without a call
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # a convolution, whose weight has three dimensions
}
"""Families that break an assumption each."""
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},  # experts transposed
    "nemotron_h": {  # experts without a gate, added up in the dtype of the routing weights
        "head_dim": 16,
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
    },
    "llama4_text": {  # experts that cannot be split: their module is called in another way
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "moe_layers": [1],
    },
}
"""Families with yet other experts."""
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of a family, in evaluation mode."""
    config = AutoConfig.for_model(
        family, **{**_COMMON, **(FAMILIES | ODD_FAMILIES | EXPERT_FAMILIES)[family], **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # the default of 0.02 makes blocks almost transparent
            if parameter.ndim >= 2:
                parameter.data.mul_(3.0)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()

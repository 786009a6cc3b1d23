"""Tiny random models of the kinds whose logits are easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2_SHAPE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SHAPE),
    "gemma2": (Gemma2Config, SHAPE | {"head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 8}),
    "gpt2": (GPT2Config, GPT2_SHAPE),
    "cohere": (CohereConfig, SHAPE | {"logit_scale": 0.0625}),
    "granite": (GraniteConfig, SHAPE | {"logits_scaling": 8.0}),
    "mixtral": (MixtralConfig, SHAPE | {"num_local_experts": 4}),
    "opt": (OPTConfig, SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A function of (kind, seed) to a random model in evaluation mode whose predictions are far from uniform."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

    def make(kind: str, seed: int = 0) -> Any:
        config_class, fields = KINDS[kind]
        config = config_class(vocab_size=len(tiny_tokenizer), **special, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model

    return make


@pytest.fixture(scope="session")
def text() -> str:
    return "Once upon a time there was a quick brown fox. Café, naïve, 東京! " * 6

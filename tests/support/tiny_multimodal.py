"""Tiny random multimodal models: a language model with a vision tower, and inputs with an image for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

_TEXT = {
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
_SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # one more than the language model has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE = 5  # the token that stands for a piece of an image

Made = tuple[Any, dict[str, torch.Tensor]]


def _gemma3() -> Made:
    """Named otherwise in the file than in the model, tied, a norm in the projector."""
    text = {**_TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**_SIGHT, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return transformers.Gemma3ForConditionalGeneration(config), _pixels(4, 28)


def _qwen3_5() -> Made:
    """Linear attention; transformers' causal language model of this config would drop the vision tower."""
    text = {**_TEXT, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen3_5Config(
        text_config=text,
        vision_config={**sight, "out_hidden_size": 64, "num_position_embeddings": 16},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return transformers.Qwen3_5ForConditionalGeneration(config), _patches()


def _qwen2_vl() -> Made:
    """No causal language model for the text part alone."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return transformers.Qwen2VLForConditionalGeneration(config), _patches()


def _llava() -> Made:
    """Two models of other families put together; the vision tower is the larger one."""
    config = transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_SIGHT, "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), _pixels(4, 28)


def _mistral3() -> Made:
    config = transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral", "head_dim": 16},
        vision_config={**_SIGHT, "model_type": "pixtral", "image_size": 56, "head_dim": 16},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    sizes = {"image_sizes": torch.tensor([[28, 56]])}
    return transformers.Mistral3ForConditionalGeneration(config), _pixels(2, 56) | sizes


def _llama4() -> Made:
    """The language model is a causal language model itself; fused experts. Images need a newer transformers."""
    sight = {**_SIGHT, "intermediate_size": 128, "vision_output_dim": 32, "pixel_shuffle_ratio": 0.5}
    text = {**_TEXT, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    config = transformers.Llama4Config(
        text_config={**text, "moe_layers": [1]},
        vision_config={**sight, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=IMAGE,
    )
    return transformers.Llama4ForConditionalGeneration(config), _pixels(1, 28)


def _tokens(pieces: int) -> torch.Tensor:
    return torch.tensor([[10, 11, 12, 7] + [IMAGE] * pieces + [8, 20, 21, 22]])


def _pixels(pieces: int, width: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(pieces), "pixel_values": torch.randn(1, 3, 28, width)}


def _patches() -> dict[str, torch.Tensor]:
    tokens = _tokens(1)
    kinds = (tokens == IMAGE).int()
    grid = torch.tensor([[1, 2, 2]])
    pixels = torch.randn(4, 3 * 2 * 14 * 14)
    return {"input_ids": tokens, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


MULTIMODAL: dict[str, Callable[[], Made]] = {
    "gemma3": _gemma3,
    "qwen3_5": _qwen3_5,
    "qwen2_vl": _qwen2_vl,
    "llava": _llava,
    "mistral3": _mistral3,
    "llama4": _llama4,
}


def tiny_multimodal(family: str, folder: Path, tokenizer: Any) -> Made:
    """A random model in ``folder`` with a tokenizer; the model in bfloat16, and inputs with an image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MULTIMODAL[family]()
        for parameter in model.parameters():
            parameter.data = (parameter.data * (3.0 if parameter.ndim >= 2 else 1.0)).bfloat16()  # not the buffers
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = type(model).from_pretrained(folder).eval()
    return model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}

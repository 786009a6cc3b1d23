"""Small models and their quantized checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ptq.checkpoint.writer import CheckpointWriter
from ptq.containers.select import CONTAINERS, select_container
from ptq.quantized import QuantizedWeight
from ptq.report import Report
from ptq.runtime.linear import QuantLinear
from ptq.scheme import SCALE_DTYPES, KeyValueScheme, Scheme
from tests.support.integer_weights import integer_weight, zero_of
from tests.support.reports import empty_report

SYM = Scheme(bits=3, group_size=32, scale_dtype="float16")
ASYM = Scheme(bits=3, symmetric=False, group_size=32, scale_dtype="float16")
TOKENS = torch.arange(12).reshape(2, 6) * 5


def llama(hidden_size: int = 64, tie_word_embeddings: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=80,
        tie_word_embeddings=tie_word_embeddings,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=80, bos_token_id=0, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest on min-max scales, group by group."""
    groups = torch.split(weight.float(), scheme.group_size or weight.shape[1], dim=1)
    half = 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        spans = [group.abs().amax(1) / half for group in groups]
    else:
        spans = [(group.amax(1) - group.amin(1)) / (2 * half - 1) for group in groups]
    scale = torch.stack(spans, 1).clamp_min(1e-6).to(SCALE_DTYPES[scheme.scale_dtype])
    zero = torch.full(scale.shape, half, dtype=torch.uint8)
    if not scheme.symmetric:
        lows = torch.stack([group.amin(1) for group in groups], 1)
        zero = (-lows / scale.float()).round().clamp(0, 2 * half - 1).to(torch.uint8)
    empty = integer_weight(
        torch.empty(weight.shape, dtype=torch.uint8), scale, None if scheme.symmetric else zero, scheme
    )
    codes = empty.scaled_grid().round(weight.float())
    return integer_weight(codes, scale, zero_of(empty), scheme)


def linears_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def report() -> Report:
    return empty_report("test")


def write(
    model: PreTrainedModel,
    out: Path,
    schemes: Mapping[str, Scheme | None],
    wanted: str = "auto",
    key_values: KeyValueScheme | None = None,
) -> PreTrainedModel:
    """Write a checkpoint (a shard a block) and give back the dense model with the same, dequantized weights."""
    linears = linears_of(model)
    name_of_format = (
        "compressed-tensors" if wanted == "forced" else select_container(wanted, schemes, linears, nn.Module())[0]
    )
    module = CONTAINERS[name_of_format]
    state, shards = model.state_dict(), dict[str, dict[str, Tensor]]()
    linear: Any
    for name, linear in linears.items():
        scheme = schemes.get(name)
        if scheme is None:
            continue
        turn: Callable[[Tensor], Tensor] = (lambda w: w.T) if isinstance(linear, Conv1D) else (lambda w: w)
        quantized = nearest(turn(linear.weight.detach()), scheme)
        shards.setdefault(name.split(".")[2], {}).update(module.layer_tensors(name, quantized))
        del state[f"{name}.weight"]
        linear.weight.data = turn(quantized.dequantize(model.dtype)).contiguous()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    writer = CheckpointWriter(out)
    for block, tensors in shards.items():
        writer.write_part(f"block {block}", tensors)
    writer.write_part("rest", state)
    writer.finish(model.config.to_dict(), module.quantization_config(schemes, linears, key_values=key_values), report())
    model.train(False)
    return model


def blocks(model: PreTrainedModel, scheme: Scheme) -> dict[str, Scheme | None]:
    return {name: None if name == "lm_head" else scheme for name in linears_of(model)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS).logits
    return result


def packed(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]

"""What the config of a model folder may ask for, checked before transformers reads it.

A config is data, but transformers lets it name code to run (``auto_map``), kernels to download
(``attn_implementation``), another weight file (``transformers_weights``), and sizes that are allocated before any
weight is looked at. Nothing here runs or fetches anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from calib.checkpoint.json import quoted, read_json
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError
from calib.model.model_class import AUTO_CLASSES

__all__ = ["MAX_CONFIG_BYTES", "check_config", "check_sizes", "check_tokenizer_config"]

MAX_CONFIG_BYTES = 8 << 20
"""Configs of models have kilobytes; one scheme for each of many thousand linears makes it a megabyte."""
MAX_INTEGER = 2**53
MAX_POSITIONS = 2**27
# A size may exceed what the checkpoint holds up to here: configs carry numbers of parts that a checkpoint lacks.
FREE_LAYERS, FREE_EXPERTS, FREE_WIDTH = 256, 1024, 2**17

_RUN = {
    "AutoConfig",
    "AutoTokenizer",
    *(auto.__name__ for auto in AUTO_CLASSES),
}  # the entries of auto_map that we would come to run
_COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}
_WIDTHS = {
    *("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    *(
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "ffn_hidden_size",
        "vocab_size",
        "head_dim",
        "kv_channels",
    ),
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "num_kv_heads", "state_size", "conv_kernel"),
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"),
}
_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config(
    folder: Path, *, trust_remote_code: bool = False, stored: Mapping[str, StoredTensor] | None = None
) -> dict[str, Any]:
    """The content of ``config.json``, safe to be given to transformers.

    Args:
        folder: the model folder.
        trust_remote_code: what the user allowed.
        stored: the checkpoint's tensors; with them, sizes in the config that no tensor backs are refused.

    Raises:
        ModelError: damaged or larger than `MAX_CONFIG_BYTES`; code that is not allowed or lies in another repository; a
            kernel or a weight file of its own choice; a dtype that is none; sizes beyond the checkpoint's.
    """
    path = folder / "config.json"
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it is a {type(config).__name__} and not an object. Fetch it again.")
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ModelError(f"{path}: model_type is {quoted(kind)}, not a name.")
    for key in ("quantization_config", "text_config"):
        if not isinstance(config.get(key), dict | None):
            raise ModelError(f"{path}: {key} is {quoted(config[key])}, not an object.")
    _check_code(path, _auto_map(path, config), known=kind in CONFIG_MAPPING, trusted=trust_remote_code)
    for key, value in _entries(config):
        _check_entry(path, key, value)
    if "transformers_weights" in config and not config.get("quantization_config"):
        name = quoted(config["transformers_weights"])
        raise ModelError(
            f"{path} names a weight file (transformers_weights: {name}); ptq reads model.safetensors only."
        )
    if stored is not None:
        check_sizes(path, config, [tensor.shape for tensor in stored.values()])
    return config


def check_tokenizer_config(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a tokenizer whose own code would have to run without the user's leave. Call it before loading one.

    Raises:
        ModelError: ``tokenizer_config.json`` is damaged, or names code as in `check_config`.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it is a {type(config).__name__} and not an object. Fetch it again.")
    name = config.get("tokenizer_class")
    if not isinstance(name, str | None):
        raise ModelError(f"{path}: tokenizer_class is {quoted(name)}, not a name.")
    kind = check_config(folder, trust_remote_code=trust_remote_code).get("model_type")
    known = bool(kind and TOKENIZER_MAPPING_NAMES.get(kind)) or (
        name is not None and tokenizer_class_from_name(name) is not None
    )
    _check_code(path, _auto_map(path, config), known=known, trusted=trust_remote_code)


def _auto_map(path: Path, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The references to code that we would come to run, e.g. ``{"AutoConfig": ["configuration_x.XConfig"]}``."""
    given = config.get("auto_map") or {}
    given = {"AutoTokenizer": given} if isinstance(given, list) else given  # an old form of tokenizer_config.json
    if not isinstance(given, dict):
        raise ModelError(f"{path}: auto_map is {quoted(given)}, not an object.")
    found = {}
    for kind in sorted(_RUN & given.keys()):
        values = given[kind] if isinstance(given[kind], list) else [given[kind]]
        found[kind] = [value for value in values if value is not None]
        if not found[kind] or not all(isinstance(value, str) for value in found[kind]):
            raise ModelError(f"{path}: auto_map.{kind} is {quoted(given[kind])}, not the name of a class.")
    return found


def _check_code(path: Path, auto_map: Mapping[str, list[str]], *, known: bool, trusted: bool) -> None:
    """Refuse code without ``--trust-remote-code`` (unless transformers has its own) and code that must be fetched."""
    names = [name for values in auto_map.values() for name in values]
    if not names or (known and not trusted):
        return
    files = ", ".join(sorted({quoted(f"{name.rpartition('.')[0]}.py") for name in names}))
    away = next((name for name in names if "--" in name), None)
    if away is not None:
        raise ModelError(
            f"{path} asks for code of another repository ({quoted(away)}), and ptq fetches nothing that a config "
            "names. Read that code, copy its files into the folder, and drop the part up to '--' from auto_map"
            + ("; or leave --trust-remote-code away: transformers has code of its own." if known else ".")
        )
    if not trusted:
        raise ModelError(
            f"{path} needs Python code that comes with the model ({files}), and transformers has none of its own for "
            "it. Read these files; if you trust them, allow them to run with --trust-remote-code."
        )


def _check_entry(path: Path, key: str, value: Any) -> None:
    if type(value) is int and abs(value) > MAX_INTEGER:
        raise ModelError(f"{path}: {key} is {quoted(value)}, beyond 2^53. The file is damaged.")
    if key in ("max_position_embeddings", "n_positions") and type(value) is int and value > MAX_POSITIONS:
        raise ModelError(f"{path}: {key} is {value}, the limit is {MAX_POSITIONS} tokens of context.")
    if key in ("dtype", "torch_dtype") and isinstance(value, str):
        named = getattr(torch, value.removeprefix("torch."), None)
        if value != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
            raise ModelError(f"{path}: {key} is {quoted(value)}, not a floating-point dtype such as bfloat16.")
    if key in _IMPLEMENTATIONS and value is not None and not (isinstance(value, str) and value.isidentifier()):
        raise ModelError(
            f"{path}: {key} is {quoted(value)}. ptq fetches no kernels that a config names: remove that line."
        )


def check_sizes(path: Path, config: Mapping[str, Any], stored: Collection[tuple[int, ...]]) -> None:
    """Sizes that a model would be built with must be backed by tensors: no dimension is wider than the widest one.

    Args:
        path: Of the config, for the message.
        config: As plain data.
        stored: The shapes of the checkpoint's tensors.

    Raises:
        ModelError: One is not.
    """
    widest = max((size for shape in stored for size in shape), default=0)
    limits = dict.fromkeys(_COUNTS, max(FREE_LAYERS, len(stored))) | dict.fromkeys(_WIDTHS, max(FREE_WIDTH, widest))
    limits |= dict.fromkeys(_EXPERTS, max(FREE_EXPERTS, widest, len(stored)))
    for key, value in _entries(config):
        if type(value) is int and value > limits.get(key, value):
            raise ModelError(
                f"{path}: {key} is {value}, but the checkpoint has {len(stored)} tensors, none wider than {widest} "
                f"(the limit is {limits[key]}). Do config and weights belong together?"
            )


def _entries(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with the nearest key above it (for an implementation by part of the model: its key)."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _entries(value, key if key in _IMPLEMENTATIONS else name)
    elif isinstance(data, list):
        for value in data:
            yield from _entries(value, key)
    else:
        yield key, data

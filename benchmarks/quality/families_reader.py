"""Logits of the full-precision model with the weights of a quantized folder in it; see `families.py`.

The reader follows what docs/formats.md says about the format, and shares no code with ptq.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["expected_logits", "run"]

TOKENS = [[(11 * i + 5) % 97 + 2 for i in range(12)]]


def run(model: Any) -> Any:
    """Logits as float32."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS)).logits.float().numpy()


def unpack(words: Any, bits: int, count: int) -> Any:
    """int32 ``[rows, words]`` to codes ``[rows, count]``."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def folder_weights(folder: Path) -> dict[str, Any]:
    """Values of all packed linears by name, float32 ``[out, in]``."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                if ".weight_" in key:
                    tensor = handle.get_tensor(key)
                    tensors[key] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    values = {}
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        name = key.removesuffix(".weight_packed")
        if config["quant_method"] == "ptq":
            scheme = config["schemes"][config["layers"][name]]
        else:
            scheme = config["config_groups"]["group_0"]["weights"]  # one scheme here
        bits, (out, width) = scheme["num_bits" if "num_bits" in scheme else "bits"], tensors[f"{name}.weight_shape"]
        group = np.arange(width) // (scheme["group_size"] or width)
        zero = np.full(tensors[f"{name}.weight_scale"].shape, 2 ** (bits - 1))
        if f"{name}.weight_zero_point" in tensors:
            zero = unpack(tensors[f"{name}.weight_zero_point"].T, bits, out).T
        codes = unpack(tensors[key], bits, width)
        values[name] = ((codes - zero[:, group]) * tensors[f"{name}.weight_scale"][:, group]).astype(np.float32)
    return values


def expected_logits(source: Path, folder: Path) -> tuple[Any, Any]:
    """Logits of the full-precision model with the weights of ``folder`` in it: exact, and rounded to its dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    values = {name: torch.from_numpy(value) for name, value in folder_weights(folder).items()}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
        for name, value in values.items():
            put(model, name, value.to(dtype).float())
        results.append(run(model))
    return results[0], results[1]


def put(model: Any, name: str, value: Any) -> None:
    """Give a linear its weight; an expert's is a slice of a fused tensor."""
    modules = dict(model.named_modules())
    if name in modules:
        weight = modules[name].weight.data
        weight.copy_(value if type(modules[name]).__name__ != "Conv1D" else value.T)
        return
    parent, index, leaf = name.rsplit(".", 2)
    experts = modules[parent]
    fused = experts.down_proj if leaf == "down_proj" else getattr(experts, "gate_up_proj", None)
    fused = experts.up_proj if fused is None else fused
    one = fused.data[int(index)]
    one = one.T if experts.is_transposed else one
    if leaf != "down_proj" and hasattr(experts, "gate_up_proj"):
        second = int(leaf == "up_proj")
        one = one.chunk(2)[second] if experts.is_concatenated else one[second::2]
    one.copy_(value)

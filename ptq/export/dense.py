"""The dequantized folder: what any other tool can begin with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from calib.checkpoint.atomic_files import os_errors
from calib.checkpoint.files import stored_tensors
from calib.checkpoint.reader import unmerged_experts
from calib.model.structure import end_modules, tied_head
from ptq.errors import UsageError
from ptq.export.result import Part, Result
from ptq.quantized import QuantizedWeight
from ptq.transforms.hadamard import InputRotation
from ptq.transforms.rotation.online import StreamRotation

__all__ = ["DENSE_DTYPES", "DenseExport", "dense_weight"]

DENSE_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
"""Names of formats, and what their numbers are."""


class DenseExport:
    """Every weight as a number of one dtype.

    Args:
        result: the quantized model.
        name: a key of `DENSE_DTYPES`.

    Raises:
        UsageError: experts that readers would look for under another name.
    """

    def __init__(self, result: Result, name: str) -> None:
        self.name, self.dtype, self._result = name, DENSE_DTYPES[name], result
        stray = unmerged_experts(result.skeleton)
        if stray is not None:
            raise UsageError(
                f"{stray} is an expert that transformers keeps in one tensor with others, and a dequantized folder "
                "cannot be written for such a model: load it with ptq.load."
            )

    def notes(self) -> list[str]:
        """What a reader of the folder does not do, one sentence each."""
        schemes = self._result.schemes.values()
        found = []
        if any(scheme.rounds_input for scheme in schemes):
            found.append("the inputs of linears are not rounded in the exported model")
        if self._result.key_values is not None:
            found.append("keys and values are not rounded in the exported model")
        return found

    @cached_property
    def _last_norm(self) -> dict[str, Tensor]:
        """Of a result that rotates its residual stream at run time: read once, though every weight file asks."""
        online = self._result.residual_rotation
        return {} if online is None else _read(self._result, online.norm)

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """What one weight file of the result becomes."""
        own = self._result.dtype
        tensors = {
            # Tensors that are kept in another dtype than the model's have their reasons (routing biases, states).
            key: tensor.to(self.dtype) if tensor.dtype in (own, self.dtype) else tensor
            for key, tensor in part.others.items()
        }
        online = self._result.residual_rotation
        if online is not None:
            merged = _merged(online, self._last_norm, self._result, part.others)
            tensors |= {key: value.to(self.dtype) for key, value in merged.items()}
        for name, weight in part.linears():
            values = dense_weight(weight).to(self.dtype)
            transposed = isinstance(self._result.linears.get(name), Conv1D)
            tensors[f"{name}.weight"] = values.T.contiguous() if transposed else values
        return tensors

    def config(self) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """``config.json``, its ``quantization_config``, and more files."""
        config = {key: value for key, value in self._result.plain_config.items() if key != "torch_dtype"}
        tie = {} if self._result.residual_rotation is None else {"tie_word_embeddings": False}
        return config | tie | {"dtype": str(self.dtype).removeprefix("torch.")}, None, {}


def _merged(
    online: StreamRotation, norm: Mapping[str, Tensor], result: Result, others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What an online rotation of the residual stream makes of the tensors beside it, so that nothing rotates any more.

    Args:
        online: The rotation.
        norm: The last norm's tensors.
        result: The whole result.
        others: Of one weight file; the head's tensor goes where the embedding is.
    """
    embedding, _ = end_modules(result.skeleton)
    names = {module: name for name, module in result.skeleton.named_modules()}
    table, head = f"{names[embedding]}.weight", tied_head(result.skeleton)
    own = [key for key in (f"{name}.weight" for name in online.embeddings) if key in others]
    merged = {key: online.merged_rows(others[key]) for key in own}
    if table in others:
        merged[f"{head}.weight"] = online.merged_rows(others[table], online.gain(norm))
    if f"{online.norm}.weight" in others:
        merged |= {f"{online.norm}.{leaf}": value for leaf, value in online.merged_norm(norm).items()}
    return merged


def _read(result: Result, module: str) -> dict[str, Tensor]:
    """Weight and bias of a module, from the file that holds them.

    Raises:
        UsageError: The tensors have other names than in the model.
    """
    stored, found = stored_tensors(result.folder), {}
    for leaf in ("weight", "bias"):
        one = stored.get(f"{module}.{leaf}")
        if one is not None:
            with os_errors(one.file, "read"), safe_open(one.file, "pt") as file:
                found[leaf] = file.get_tensor(f"{module}.{leaf}")
    if "weight" not in found:
        raise UsageError(f"{result.folder} has no tensor {module}.weight, before which its config rotates the stream.")
    return found


def dense_weight(weight: QuantizedWeight) -> Tensor:
    """The weight ``[out, in]`` for inputs as they are, float32.

    The powers of two of LLM-FP4's folded shifts are taken out of it, and a rotation is undone.
    """
    values, record = weight.dequantize(), weight.scheme.activation_format
    if record is not None:
        values = record.plain_weight(values, weight.input_params)
    rotation = weight.scheme.input_rotation
    return values if rotation is None else InputRotation.of(rotation, values.shape[1]).inverse(values)

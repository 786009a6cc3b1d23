"""The dequantized folder: what any other tool can begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from calib.checkpoint.reader import unmerged_experts
from ptq.errors import UsageError
from ptq.export.result import Part, Result
from ptq.quantized import QuantizedWeight
from ptq.transforms.hadamard import InputRotation

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

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """What one weight file of the result becomes."""
        own = self._result.dtype
        tensors = {
            # Tensors that are kept in another dtype than the model's have their reasons (routing biases, states).
            key: tensor.to(self.dtype) if tensor.dtype in (own, self.dtype) else tensor
            for key, tensor in part.others.items()
        }
        for name, weight in part.linears():
            values = dense_weight(weight).to(self.dtype)
            transposed = isinstance(self._result.linears.get(name), Conv1D)
            tensors[f"{name}.weight"] = values.T.contiguous() if transposed else values
        return tensors

    def config(self) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """``config.json``, its ``quantization_config``, and more files."""
        config = {key: value for key, value in self._result.plain_config.items() if key != "torch_dtype"}
        return config | {"dtype": str(self.dtype).removeprefix("torch.")}, None, {}


def dense_weight(weight: QuantizedWeight) -> Tensor:
    """The weight ``[out, in]`` for inputs as they are, float32: of a rotated one, the rotation is undone."""
    values = weight.dequantize()
    rotation = weight.scheme.input_rotation
    return values if rotation is None else InputRotation.of(rotation, values.shape[1]).inverse(values)

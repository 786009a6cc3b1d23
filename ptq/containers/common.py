"""What containers of other toolkits have in common: plain integers in plain linears, and nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from calib.model.structure import find_blocks, fused_experts
from ptq.errors import OutputError
from ptq.scheme import SCALE_DTYPES, KeyValueScheme, Scheme

__all__ = ["check_tensors", "model_problem", "plain_integers"]


def plain_integers(name: str, scheme: Scheme, linear: nn.Module, reader: str) -> str | None:
    """Why a weight is more than integers with scales that readers keep as they are; ``None`` if it is not.

    Args:
        name: of the linear, for the message.
        scheme: of the linear.
        linear: the module, in the dtype that ``config.json`` will name.
        reader: what users call the container.
    """
    if scheme.format != "int":
        return f"{name} is {scheme.describe()}, and {reader} holds integers"
    if scheme.rounds_input:
        kind = f"{scheme.act_bits} bits" if scheme.act_format is None else scheme.act_format
        return f"the input of {name} is rounded to {kind} at run time, which {reader} does not do"
    if scheme.input_rotation is not None:
        return f"the input of {name} is rotated at run time, which {reader} does not do"
    if not isinstance(linear, nn.Linear):
        return f"{name} is a {type(linear).__name__}, and {reader} holds torch.nn.Linear"
    if scheme.group_size is not None and linear.in_features % scheme.group_size:
        return f"{name} has {linear.in_features} input channels, not a multiple of the group size {scheme.group_size}"
    scale_dtype, dtype = scheme.resolved(linear.weight.dtype).scale_dtype, linear.weight.dtype
    if SCALE_DTYPES[scale_dtype] != dtype and not (dtype == torch.float32 and scale_dtype == "float16"):
        model_dtype = str(dtype).removeprefix("torch.")
        return f"{name} has {scale_dtype} scales, which readers of {reader} would round to the model's {model_dtype}"
    return None


def model_problem(model: nn.Module, key_values: KeyValueScheme | None) -> str | None:
    """Why a model beside its linears is more than readers of other containers compute; ``None`` if it is not."""
    if key_values is not None:
        return f"keys and values are rounded to {key_values.bits} bits at run time, which only ptq does"
    blocks = tuple(f"{block}." for block in find_blocks(model))
    fused = next((name for name in fused_experts(model) if name.startswith(blocks)), None)
    return None if fused is None else f"{fused} holds experts in full precision in one tensor"


def check_tensors(
    name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], needed_by: str
) -> None:
    """Check that the tensors of a linear are there in the shapes of its layout.

    Args:
        name: Of the linear.
        tensors: By full name.
        wanted: Shapes by the tensors' names in the linear.
        needed_by: What has that layout, for the message.

    Raises:
        OutputError: One is missing or has another shape.
    """
    for role, size in wanted.items():
        found = tensors.get(f"{name}.{role}")
        if found is None or tuple(found.shape) != size:
            shown = "missing" if found is None else f"{list(found.shape)}"
            raise OutputError(
                f"{name}.{role} is {shown}, but {needed_by} needs {list(size)}: the checkpoint is damaged, quantize "
                f"again."
            )

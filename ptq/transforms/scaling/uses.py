"""Channel scalings as data: which entries of which tensors are multiplied or divided by which scale.

A scaling is one vector of positive scales and its uses. A use of power +1 multiplies, one of power -1 divides; together
they leave the block's output as it is. One function applies every use, for folding as well as for learning: it is
differentiable in the scale.

Weights are meant as ``[out, in]`` (`calib.model.structure.linear_weight`): the transposed ones of `Conv1D` are turned
by the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["ScaleUse", "Scaling", "apply_scaling", "fold_scaling", "scaled_values"]


@dataclasses.dataclass(frozen=True)
class ScaleUse:
    """What a scaling does to one tensor.

    Args:
        parameter: its name in the block, e.g. ``self_attn.q_proj.weight``.
        axis: 0 for the rows of a weight ``[out, in]`` or for a vector, 1 for the columns.
        power: +1 multiplies with the scale, -1 divides by it.
        index: int64, position along the axis -> number of the scale; -1 leaves a position as it is.
        offset: of a norm whose gain is ``weight + offset``, else 0.
    """

    parameter: str
    axis: int
    power: int
    index: Tensor
    offset: float = 0.0

    def to(self, device: torch.device) -> ScaleUse:
        """The same with the index on a device."""
        return dataclasses.replace(self, index=self.index.to(device))


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One vector of scales, and everything that it is folded into.

    Args:
        name: unique in its block: ``qkv``, ``out``, ``mlp``, ``down`` or ``qk``; where a block has several of a kind,
            the others are called after a module.
        size: how many scales; uses: of them.
    """

    name: str
    size: int
    uses: tuple[ScaleUse, ...]

    def to(self, device: torch.device) -> Scaling:
        """The same with all indices on a device."""
        return dataclasses.replace(self, uses=tuple(use.to(device) for use in self.uses))


def apply_scaling(parameter: Tensor, use: ScaleUse, scale: Tensor) -> Tensor:
    """``(p + offset) * scale[index] ** power - offset`` along the use's axis; differentiable in both tensors.

    Args:
        parameter: ``[out, in]`` or a vector; use: of it.
        scale: ``[size]``, positive.

    Returns:
        A new tensor in the dtype that the product has.
    """
    index = use.index.to(parameter.device)
    factor = scale.to(parameter.device)[index.clamp(min=0)]
    factor = torch.where(index < 0, torch.ones_like(factor), factor if use.power > 0 else 1.0 / factor)
    if parameter.ndim == 2:
        factor = factor[:, None] if use.axis == 0 else factor[None]
    return (parameter + use.offset) * factor - use.offset if use.offset else parameter * factor


def scaled_values(block: nn.Module, uses: tuple[ScaleUse, ...], scale: Tensor) -> Mapping[str, Tensor]:
    """The values of a block's parameters under a scaling, as they are stored, by name in the block."""
    values: dict[str, Tensor] = {}
    for use in uses:
        module, _, leaf = use.parameter.rpartition(".")
        turned = isinstance(block.get_submodule(module), Conv1D) and leaf == "weight"
        value = values.get(use.parameter, block.get_parameter(use.parameter).detach())
        scaled = apply_scaling(value.T if turned else value, use, scale).to(value.dtype)
        values[use.parameter] = scaled.T if turned else scaled
    return values


@torch.no_grad()
def fold_scaling(block: nn.Module, scaling: Scaling, scale: Tensor) -> None:
    """Put the scaled values into the block, in the dtypes they have there.

    Args:
        block: with its weights; scaling: of it; scale: ``[size]``.
    """
    for name, value in scaled_values(block, scaling.uses, scale).items():
        module, _, leaf = name.rpartition(".")
        block.get_submodule(module)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

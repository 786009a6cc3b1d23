"""An assignment in which the inputs of the linears that end every block's MLP are rotated at run time."""

from __future__ import annotations

import dataclasses

import torch

from calib.checkpoint.reader import ModelSource
from calib.model.input_groups import InputGroup
from ptq.pipeline.preparation.schemes.block_maps import trace_block_kinds
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.scheme import Rotation

__all__ = ["rotate_inputs", "rotate_last_inputs"]

_INPUT_BLOCK = 256  # of `rotate_inputs`, where nothing is said


def rotate_inputs(plan: Plan, seed: int, block: int | None = None) -> Plan:
    """The plan with a randomised Hadamard rotation of the input of every linear; equal ones, so that linears which read
    the same input rotate it alike.

    Args:
        plan: Schemes.
        seed: Of the rotation's signs.
        block: The largest block of the transform, 256 by default.
    """
    rotation = Rotation(seed, block or _INPUT_BLOCK)
    schemes = {
        name: None if scheme is None else dataclasses.replace(scheme, input_rotation=rotation)
        for name, scheme in plan.schemes.items()
    }
    return dataclasses.replace(plan, schemes=schemes)


def rotate_last_inputs(
    plan: Plan, source: ModelSource, rotation: Rotation, device: torch.device, dtype: torch.dtype
) -> Plan:
    """The plan with a randomised Hadamard rotation of the input of the linears that end every block: what the MLP's
    activation leaves has the largest outliers of all inputs.

    The first block of every kind is run on a few dummy tokens; its last input group says which linears end it (of a
    mixture, the last of every expert as well).

    Args:
        plan: Schemes.
        source: The model.
        rotation: Of these inputs.
        device: Where blocks are run.
        dtype: Of the pass.

    Raises:
        ModelError: A block cannot be run.
    """
    ends = {name for groups in trace_block_kinds(source, device, dtype).values() for name in _last(groups)}
    schemes = {
        name: dataclasses.replace(scheme, input_rotation=rotation)
        if scheme is not None and _inside(name, ends)
        else scheme
        for name, scheme in plan.schemes.items()
    }
    return dataclasses.replace(plan, schemes=schemes)


def _last(groups: tuple[InputGroup, ...]) -> set[str]:
    """Names, in their block, of the linears that end it."""
    last = [group for group in groups if not group.experts][-1:] or list(groups[-1:])
    experts = {group.expert: group.linears for group in groups if group.expert}  # the last group of each stays
    return {name for group in last for name in group.linears} | {name for names in experts.values() for name in names}


def _inside(name: str, ends: set[str]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)

"""An assignment in which the inputs of the linears that end every block's MLP are rotated at run time."""

from __future__ import annotations

import dataclasses

import torch

from calib.checkpoint.reader import ModelSource
from calib.model.input_groups import InputGroup
from ptq.pipeline.preparation.block_maps import trace_block_kinds
from ptq.pipeline.preparation.scheme_assignment import Plan
from ptq.scheme import Rotation

__all__ = ["rotate_last_inputs"]


def rotate_last_inputs(plan: Plan, source: ModelSource, seed: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan with a randomised Hadamard rotation of the input of the linears that end every block: what the MLP's
    activation leaves has the largest outliers of all inputs.

    The first block of every kind is run on a few dummy tokens; its last input group says which linears end it (of a
    mixture, the last of every expert as well).

    Args:
        plan: Schemes.
        source: The model.
        seed: Of the rotation's signs.
        device: Where blocks are run.
        dtype: Of the pass.

    Raises:
        ModelError: A block cannot be run.
    """
    ends = {name for groups in trace_block_kinds(source, device, dtype).values() for name in _last(groups)}
    schemes = {
        name: dataclasses.replace(scheme, input_rotation=Rotation(seed))
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

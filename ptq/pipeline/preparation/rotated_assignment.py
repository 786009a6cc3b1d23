"""Which linears of a model end its blocks, and a plan in which their inputs are rotated at run time."""

from __future__ import annotations

import dataclasses

import torch

from calib.checkpoint.reader import ModelSource
from calib.model.structure import find_linears
from calib.precision import strict_float32
from calib.runner.block import BlockContext
from calib.runner.runner import CalibrationRunner
from ptq.pipeline.preparation.scheme_assignment import Plan

__all__ = ["rotate_last_inputs"]


def rotate_last_inputs(plan: Plan, source: ModelSource, seed: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan with a randomised Hadamard rotation of the input of the linears that end every block: what the MLP's
    activation leaves has the largest outliers of all inputs.

    The first block of every kind is run on a few made-up tokens; its last input group says which linears end it (of a
    mixture, the last of every expert as well).

    Args:
        plan: schemes; source: the model; seed: of the rotation's signs.
        device, dtype: of the pass.

    Raises:
        ModelError: a block cannot be run.
    """
    with torch.no_grad(), strict_float32():
        runner = CalibrationRunner(source, None, device=device, dtype=dtype)
        ends = _ends(runner)
    schemes = {
        name: dataclasses.replace(scheme, input_rotation=seed) if scheme is not None and _inside(name, ends) else scheme
        for name, scheme in plan.schemes.items()
    }
    return dataclasses.replace(plan, schemes=schemes)


def _ends(runner: CalibrationRunner) -> set[str]:
    """Names, in their block, of the linears that end a block, from the first block of every kind."""
    blocks = [runner.source.skeleton.get_submodule(name) for name in runner.block_names]
    left = {(type(block), tuple(find_linears(block))) for block in blocks}
    found: set[str] = set()
    for context in runner:
        kind = (type(context.block), tuple(context.linears))
        if kind in left:
            found |= _last(context)
            left.discard(kind)
        if not left:
            break
    return found


def _last(context: BlockContext) -> set[str]:
    groups = context.runner.map_of(context).groups
    last = [group for group in groups if not group.experts][-1:] or list(groups[-1:])
    experts = {group.expert: group.linears for group in groups if group.expert}  # the last group of each stays
    return {name for group in last for name in group.linears} | {name for names in experts.values() for name in names}


def _inside(name: str, ends: set[str]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)

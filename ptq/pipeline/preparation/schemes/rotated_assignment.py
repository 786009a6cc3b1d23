"""An assignment in which the inputs of the linears that end every block's MLP are rotated at run time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from calib.checkpoint.reader import ModelSource
from calib.model.input_groups import InputGroup
from ptq.containers.vllm_tensors import unsigned
from ptq.integration.swap import linear_shape
from ptq.pipeline.preparation.schemes.block_maps import block_kind, trace_block_kinds
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.scheme import Rotation, Scheme

__all__ = ["drop_signs", "resize_rotations", "rotate_inputs", "rotate_last_inputs", "seed_rotations"]

_DEFAULT_SEED = 0  # of the rotations of number formats
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


def drop_signs(plan: Plan, linears: Mapping[str, nn.Module]) -> Plan:
    """The plan with its rotations as compressed-tensors can describe them.

    Args:
        plan: Schemes.
        linears: The modules by name.
    """
    schemes: dict[str, Scheme | None] = {}
    for name, scheme in plan.schemes.items():
        shape = linear_shape(linears[name])
        if scheme is not None and scheme.input_rotation is not None and shape is not None:
            scheme = dataclasses.replace(scheme, input_rotation=unsigned(scheme.input_rotation, shape[1]))
        schemes[name] = scheme
    return dataclasses.replace(plan, schemes=schemes)


def resize_rotations(plan: Plan, block: int) -> Plan:
    """The plan with another block size for the rotations that number formats begin with; those that a scheme of the
    recipe describes by itself stay.

    Args:
        plan: Schemes.
        block: The largest block of the transform.
    """
    return dataclasses.replace(plan, schemes={name: _resized(scheme, block) for name, scheme in plan.schemes.items()})


def _resized(scheme: Scheme | None, block: int) -> Scheme | None:
    if scheme is None or scheme.input_rotation is None:
        return scheme
    if scheme.input_rotation != Rotation.of(scheme.number_format.defaults.get("input_rotation")):
        return scheme
    return dataclasses.replace(scheme, input_rotation=dataclasses.replace(scheme.input_rotation, block=block))


def seed_rotations(plan: Plan, source: ModelSource, seed: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan with signs of its own for the rotation of every input: linears that read the same tensor (q, k and v;
    gate and up; experts) have the same ones.

    Rotations whose seed is another than that of a number format's defaults, or of this run, were asked for by number
    and stay. The signs follow from the run's seed, the block's name and the first linear that reads the input.

    Args:
        plan: Schemes.
        source: The model.
        seed: Of the run.
        device: Where the first block of every kind is run, to see what reads what.
        dtype: Of that pass.

    Raises:
        ModelError: A block cannot be run.
    """
    wanted = {
        name: rotation
        for name, scheme in plan.schemes.items()
        if scheme is not None
        and (rotation := scheme.input_rotation) is not None
        and rotation.kind == "hadamard"
        and rotation.seed in (_DEFAULT_SEED, seed)
    }
    if not wanted:
        return plan
    kinds = trace_block_kinds(source, device, dtype)
    schemes = dict(plan.schemes)
    for block in plan.blocks:
        points = _points(kinds[block_kind(source.skeleton.get_submodule(block))])
        for name, rotation in wanted.items():
            scheme = schemes[name]
            if name.startswith(f"{block}.") and scheme is not None:
                inside = name.removeprefix(f"{block}.")
                own = _seed_of(seed, f"{block}.{points.get(inside, inside)}")
                schemes[name] = dataclasses.replace(scheme, input_rotation=dataclasses.replace(rotation, seed=own))
    return dataclasses.replace(plan, schemes=schemes)


def _points(groups: tuple[InputGroup, ...]) -> dict[str, str]:
    """By linear, the name of its input: the first linear of its group; of an expert, without the expert's number."""
    points = {}
    for group in groups:
        point = group.linears[0]
        if group.expert:
            point = f"{group.experts}.*{point.removeprefix(group.expert)}"
        points.update(dict.fromkeys(group.linears, point))
    return points


def _seed_of(seed: int, name: str) -> int:
    """A seed of 31 bits, which every reader of JSON can hold."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest(), "big") >> 1


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

"""The container of an output, decided once: what was begun in, what loads, and what runtimes read into one kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from calib.checkpoint.reader import ModelSource
from calib.model.input_groups import InputGroup
from calib.model.structure import all_linears
from ptq.checkpoint.journal import Journal
from ptq.containers.select import select_container
from ptq.errors import UsageError
from ptq.pipeline.preparation.preflight import clashing_schemes
from ptq.pipeline.preparation.schemes.block_maps import trace_block_kinds
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.proof import FormatChoice, settle_format
from ptq.recipe import Recipe
from ptq.report import STAGING
from ptq.scheme import KeyValueScheme
from ptq.transforms.rotation.online import StreamRotation
from ptq.transforms.rotation.rotated_source import RotatedSource

__all__ = ["CONTAINER_CONDITION", "choose_container", "key_values_of", "online_rotation", "rotates_head_online"]

CONTAINER_CONDITION = "container"
"""Name in the conditions of a journal, which hold the container and the reason for it."""


def choose_container(
    source: ModelSource,
    assignment: Plan,
    recipe: Recipe,
    *,
    out: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> FormatChoice:
    """The container of an output.

    Args:
        source: The model.
        assignment: What will be done to its linears.
        recipe: The container that is asked for.
        out: The output folder, whose unfinished run goes on in the container that it began with; ``None`` starts over.
        device: Where blocks are run to see which linears read the same input.
        dtype: Of that pass.
        trust_remote_code: Run modelling code that ships with the model.

    Raises:
        UsageError: The container that is asked for cannot carry the result, or linears that runtimes fuse have
            different schemes in it.
        ModelError: Not even the native container loads.
    """
    requested, ends = recipe.container, ", ".join(assignment.outside)
    if ends and requested not in ("auto", "native"):
        raise UsageError(
            f"the container {requested} cannot carry a quantized embedding or head ({ends}): say --container native, "
            f"or leave them in full precision."
        )
    tied = online_rotation(source) is not None
    settled = settle_format(
        "native" if ends or tied else requested,
        assignment.schemes,
        source,
        key_values_of(recipe),
        trust_remote_code=trust_remote_code,
    )
    if ends and requested == "auto":
        settled = dataclasses.replace(settled, reason=f"{ends} is quantized, which no other container carries")
    elif tied and requested == "auto":
        settled = dataclasses.replace(
            settled, reason="the residual stream is rotated at run time, so that the tie stays"
        )
    begun = None if out is None else _begun(out)
    if begun is not None:
        return dataclasses.replace(settled, name=begun[0], reason=begun[1])
    if settled.name == "native" or len(set(assignment.schemes.values())) == 1:
        return settled
    return _without_clashes(settled, assignment, recipe, trace_block_kinds(source, device, dtype).values())


def rotates_head_online(source: ModelSource, assignment: Plan, recipe: Recipe) -> bool:
    """Whether a head that is tied to the embedding stays so when the residual stream is rotated.

    Only the native container says what is rotated at run time, so it does where the result will be in that one.

    Args:
        source: The model, before anything is rotated.
        assignment: What will be done to its linears.
        recipe: The container that is asked for, and rotations.
    """
    if recipe.rotate_head != "auto":
        return recipe.rotate_head == "online"
    if recipe.container != "auto":
        return recipe.container == "native"
    if assignment.outside or {"input", "down"} & set(recipe.rotate):
        return True
    linears = all_linears(source.skeleton)
    name, _ = select_container("auto", assignment.schemes, linears, source.skeleton, key_values_of(recipe))
    return name == "native"


def online_rotation(source: ModelSource) -> StreamRotation | None:
    """How the residual stream of a model is rotated at run time; ``None`` where it is not."""
    return source.online if isinstance(source, RotatedSource) else None


def key_values_of(recipe: Recipe) -> KeyValueScheme | None:
    """How keys and values are rounded at run time; ``None`` leaves them as they are."""
    return None if recipe.kv_bits is None else KeyValueScheme(recipe.kv_bits, recipe.kv_symmetric)


def _without_clashes(
    choice: FormatChoice, assignment: Plan, recipe: Recipe, maps: Iterable[tuple[InputGroup, ...]]
) -> FormatChoice:
    """The choice, or the native container where linears that runtimes fuse into one kernel have different schemes."""
    clashes = [clash for groups in maps for clash in clashing_schemes(assignment, groups)]
    if not clashes:
        return choice
    if recipe.container == "auto":
        return choice.native_instead(clashes[0])
    raise UsageError(f"{clashes[0]} ({len(clashes)} such sets). Give them one, or say --container native.")


def _begun(out: Path) -> tuple[str, str] | None:
    """Container and reason of an unfinished run in the output folder."""
    journal = Journal.read_only(out / STAGING)
    if journal is None or journal.conditions is None:
        return None
    name, reason = (journal.conditions.get(f"{CONTAINER_CONDITION}.{key}") for key in ("name", "reason"))
    return None if name is None else (str(name), str(reason))

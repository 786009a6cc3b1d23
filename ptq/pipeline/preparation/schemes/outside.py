"""The embedding and the head, which are quantized only where a recipe names them in full."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from calib.model.structure import end_modules, tied_head
from ptq.errors import UsageError
from ptq.recipe import AUTO_ROTATION, Recipe
from ptq.runtime.embedding import finds_rows
from ptq.scheme import Scheme

__all__ = ["OUTSIDE_METHOD", "outside_modules", "outside_problem", "outside_schemes"]

OUTSIDE_METHOD = "rtn"
"""What rounds the embedding and the head: no method's statistics reach them."""


def outside_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding, and the head where it has a weight of its own, by full name.

    Args:
        model: the skeleton.
    """
    embedding, head = end_modules(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = tied_head(model) is not None
    found = (embedding, None if tied else head)
    return {names[id(module)]: module for module in found if module is not None and id(module) in names}


def outside_schemes(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> dict[str, Scheme]:
    """The schemes of the embedding and the head, where overrides name them in full; patterns never mean them.

    Args:
        model: the skeleton.
        recipe: its overrides.
        dtype: of the checkpoint, settles ``scale_dtype="auto"``.

    Raises:
        UsageError: one cannot be stored as asked, or the head is named and has no weight of its own.
    """
    modules, tied = outside_modules(model), tied_head(model)
    found: dict[str, Scheme] = {}
    for pattern, scheme in recipe.overrides:
        if pattern == tied:
            raise UsageError(
                f"{pattern} has no weight of its own, it multiplies by the embedding's: name {next(iter(modules))} "
                f"instead, which is stored and quantized once for both."
            )
        if pattern not in modules or pattern in found:
            continue
        weight_only = dataclasses.replace(scheme, act_bits=None, act_format=None).resolved(dtype)
        problem = outside_problem(modules[pattern], weight_only)
        if problem is not None:
            raise UsageError(f"{pattern} cannot be stored as {weight_only.describe()}: {problem}.")
        found[pattern] = weight_only
    if found and recipe.rotate not in ((), AUTO_ROTATION):
        raise UsageError(f"{next(iter(found))} cannot be quantized where --rotate is given: leave one of them out.")
    return found


def outside_problem(module: nn.Module, scheme: Scheme) -> str | None:
    """Why the embedding or the head cannot be stored so; ``None`` where it can.

    Args:
        module: the embedding or the head.
        scheme: how it is to be stored.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    if scheme.input_rotation is not None:
        return "the embedding and the head take formats without rotation of their inputs"
    if type(module) not in (nn.Embedding, nn.Linear):
        return f"it is a {type(module).__name__}, and only torch.nn.Embedding and torch.nn.Linear can be"
    if isinstance(module, nn.Embedding) and not finds_rows(scheme, rows, columns):
        return "its rows cannot be read one by one, as an embedding needs it; take a symmetric format (e.g. 4sym)"
    return scheme.number_format.unsupported_reason(rows, columns, scheme)

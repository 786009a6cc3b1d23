"""A plan put to use: checked against the model that is to be quantized, and turned into a recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from torch import nn

from calib.checkpoint.reader import open_model
from ptq.allocation.plan import Plan
from ptq.pipeline.preparation.schemes.outside import outside_modules
from ptq.recipe import Recipe

__all__ = ["recipe_from_plan"]


def recipe_from_plan(
    plan: Plan,
    model: str | os.PathLike[str] | nn.Module,
    base: Recipe,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Recipe:
    """The recipe that stores every linear of a model as a plan says.

    Args:
        plan: formats of linears.
        model: what is to be quantized.
        base: everything else of the recipe.
        trust_remote_code: run modelling code that ships with the model.
        say: called with sentences that a user should read.

    Raises:
        UsageError: the plan is for a model of another structure, or its names and patterns do not fit.
    """
    source = open_model(
        model if isinstance(model, nn.Module) else os.fspath(model),
        trust_remote_code=trust_remote_code,
        text_only=base.text_only,
    )
    plan.check(source.skeleton)
    plan.check_weights(source.skeleton)
    made = plan.about.get("fingerprint")
    if made is not None and made != source.fingerprint():
        say(
            f"the plan was made for other weights of the same structure ({plan.about.get('model')}): its figures are "
            f"not those of this model"
        )
    rest = plan.uncovered(source.skeleton)
    if rest:
        say(f"{len(rest)} linears are not in the plan and get {base.scheme.describe()}, for example {rest[0]}")
    recipe = plan.recipe(base)
    ends = outside_modules(source.skeleton).keys() - set(base.ignore)  # in full precision where nothing is said
    return dataclasses.replace(recipe, ignore=tuple(name for name in recipe.ignore if name not in ends))

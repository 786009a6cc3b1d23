"""Arguments that decide nothing in their recipe: a table of what each one needs to have an effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ptq.pipeline.preparation.method_setup import set_up_method
from ptq.recipe import CalibrationSpec, Recipe

__all__ = ["without_effect"]


class _Facts(NamedTuple):
    """A recipe, its method's config, and whether the method reads calibration text."""

    recipe: Recipe
    config: Any
    reads_data: bool


def _rotates_by_format(recipe: Recipe) -> bool:
    """Whether a scheme of the recipe rotates inputs by itself, as the number format `itq3s` does."""
    return any(s.input_rotation is not None for s in (recipe.scheme, *(scheme for _, scheme in recipe.overrides)))


class _Need(NamedTuple):
    """When arguments have an effect, and the sentence for when they have none; ``{method}`` is the method's name."""

    names: tuple[str, ...]
    met: Callable[[_Facts], bool]
    reason: str


_DATA = tuple(f"calib_{f.name}" for f in dataclasses.fields(CalibrationSpec) if f.name not in ("source", "seed"))
_NEEDS = (
    _Need(("calib", *_DATA, "offload", "compute_dtype"), lambda f: f.reads_data, "{method} reads no calibration text"),
    _Need(
        ("seed",),
        lambda f: f.reads_data or bool(f.recipe.rotate) or _rotates_by_format(f.recipe),
        "{method} draws no calibration text and nothing is rotated",
    ),
    _Need(
        ("rotate",),
        lambda f: bool(f.recipe.rotate) or not _rotates_by_format(f.recipe),
        "the number format rotates inputs by itself, which `none` does not take away",
    ),
    _Need(
        ("rotate_block",),
        lambda f: bool({"input", "down", "auto"} & set(f.recipe.rotate)) or _rotates_by_format(f.recipe),
        "no input is rotated at run time (--rotate input or down)",
    ),
    _Need(
        ("rotate_head",),
        lambda f: bool({"residual", "auto"} & set(f.recipe.rotate)),
        "the residual stream is not rotated (--rotate residual)",
    ),
    _Need(
        ("act_symmetric",),
        lambda f: any(s.act_bits is not None for s in (f.recipe.scheme, *(scheme for _, scheme in f.recipe.overrides))),
        "the inputs of linears are not rounded (act_bits is not set)",
    ),
    _Need(
        ("kv_symmetric",),
        lambda f: f.recipe.kv_bits is not None,
        "keys and values are not rounded (kv_bits is not set)",
    ),
)
_LEARNED_NEEDS = (
    _Need(("iters",), lambda f: not f.config.epochs, "epochs are given, which decide the number of steps"),
    _Need(("lr_lora",), lambda f: f.config.lora_rank > 0, "lora_rank is 0"),
    _Need(("lr_clip",), lambda f: f.config.clip != "off", "clip is off"),
    _Need(("lr_scale",), lambda f: f.config.scaling != "off", "scaling is off"),
    _Need(("lr_offset",), lambda f: f.config.rounding != "nearest", "{method} learns no offsets (rounding is nearest)"),
    _Need(("stages",), lambda f: f.config.intra != "off", "intra is off"),
)


def without_effect(names: Iterable[str], recipe: Recipe) -> dict[str, str]:
    """Of arguments that were given, those that decide nothing in this recipe, and why.

    Args:
        names: arguments of `ptq.quantize`, options of the method among them.
        recipe: what they are part of.

    Raises:
        UsageError: the recipe's method or options do not exist.
    """
    method = set_up_method(recipe)
    facts = _Facts(recipe, method.config, method.needs_data)
    needs = (*_NEEDS, *(_LEARNED_NEEDS if method.learned is not None else ()))
    given = set(names)
    return {
        name: need.reason.format(method=method.name)
        for need in needs
        if given.intersection(need.names) and not need.met(facts)
        for name in need.names
        if name in given
    }

"""What will be done to every linear, settled before the first weight is read."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping

import torch
from torch import nn

from calib.model.structure import find_blocks, find_linears, is_linear, linear_weight
from ptq.errors import UsageError
from ptq.methods import METHODS, LayerMethod, check_scheme, find_method, make_config
from ptq.pipeline.preparation.schemes.outside import outside_schemes
from ptq.pipeline.preparation.schemes.shapes import check_shapes
from ptq.recipe import Recipe
from ptq.scheme import Scheme

__all__ = ["KEEP_BY_DEFAULT", "Plan", "is_router", "make_plan"]

KEEP_BY_DEFAULT = ("*.gate", "*.gate.*", "*.router", "*.router.*", "*.shared_expert_gate")
"""Linears that choose experts: tiny, and an error there sends tokens to the wrong expert."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The scheme of every linear in the model's blocks.

    Args:
        blocks: names of the blocks.
        schemes: by full name of a linear, its scheme (scale dtype settled), or ``None`` for full precision.
        reasons: why, for those in full precision.
        outside: schemes of the embedding and the head, where they are quantized.
    """

    blocks: tuple[str, ...]
    schemes: dict[str, Scheme | None]
    reasons: dict[str, str]
    outside: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)

    @property
    def calibrates_inputs(self) -> bool:
        """Whether any linear's input has a format with parameters from calibration."""
        return any(scheme is not None and scheme.calibrates_input for scheme in self.schemes.values())

    def in_block(self, block: str) -> dict[str, Scheme]:
        """Schemes of the linears that will be quantized, by name in the block."""
        prefix = f"{block}."
        return {
            name.removeprefix(prefix): scheme
            for name, scheme in self.schemes.items()
            if scheme is not None and name.startswith(prefix)
        }


def make_plan(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> Plan:
    """Match a recipe with a model (weights are not needed).

    Args:
        model: the skeleton.
        recipe: patterns and schemes.
        dtype: of the checkpoint, settles ``scale_dtype="auto"``.

    Raises:
        UsageError: a pattern matches no linear, or nothing is left to quantize.
    """
    blocks = find_blocks(model)
    linears = [f"{block}.{name}" for block in blocks for name in find_linears(model.get_submodule(block))]
    outside = [name for name, module in model.named_modules() if is_linear(module) and name not in linears]
    ends = outside_schemes(model, recipe, dtype)
    for pattern in (*recipe.ignore, *(pattern for pattern, _ in recipe.overrides)):
        if pattern not in ends:
            _check_matches(pattern, linears, outside)
    method, checked = find_method(recipe.method), set[Scheme]()
    config = make_config(method, recipe.options)
    schemes: dict[str, Scheme | None] = {}
    reasons: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in linears:
        scheme = recipe.scheme_for(name)
        if scheme is None:
            reasons[name] = "ignored by the recipe"
        elif _kept_router(name, recipe):
            scheme, reasons[name] = None, "chooses experts"
        if scheme is not None and isinstance(method, LayerMethod):
            scheme = method.adapt(scheme, config)
        if scheme is not None:
            scheme = scheme.fitting(linear_weight(model.get_submodule(name)).shape)
        schemes[name] = None if scheme is None else scheme.resolved(dtype)
        if scheme is not None and scheme not in checked:
            check_scheme(method, scheme, METHODS.values(), config)
            checked.add(scheme)
        if scheme is not None:
            shapes[name] = tuple(linear_weight(model.get_submodule(name)).shape)
    check_shapes({name: scheme for name, scheme in schemes.items() if scheme is not None}, shapes)
    if not any(schemes.values()):
        raise UsageError(f"nothing is left to quantize: {len(linears)} linears in {len(blocks)} blocks, all kept.")
    return Plan(tuple(blocks), schemes, reasons, ends)


def is_router(name: str) -> bool:
    """Whether a module is a router, by its name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in KEEP_BY_DEFAULT)


def _kept_router(name: str, recipe: Recipe) -> bool:
    """A router, unless an override names it."""
    asked = any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in recipe.overrides)
    return not asked and is_router(name)


def _check_matches(pattern: str, linears: list[str], outside: list[str]) -> None:
    if any(fnmatch.fnmatchcase(name, pattern) for name in linears):
        return
    if any(fnmatch.fnmatchcase(name, pattern) for name in outside):
        raise UsageError(
            f"the pattern {pattern!r} matches only linears outside the blocks (the head), which stay in full precision "
            "unless an override or a plan names them in full: leave the pattern out."
        )
    near = difflib.get_close_matches(pattern, linears, n=2, cutoff=0.3) or linears[:2]
    raise UsageError(f"the pattern {pattern!r} matches no linear of the model. Names look like {', '.join(near)}.")

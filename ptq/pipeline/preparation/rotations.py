"""What ``rotate: auto`` stands for: rotations of integer grids that cost no byte in the container at hand.

For methods that compensate their errors: docs/results/2026-11-28-rotations.md has what it brings them and what it costs
``rtn``.
"""

from __future__ import annotations

from calib.checkpoint.reader import ModelSource
from calib.model.model_class import is_multimodal
from calib.model.structure import all_linears, tied_head
from ptq.containers.native import NATIVE
from ptq.containers.select import select_container
from ptq.pipeline.preparation.container import key_values_of
from ptq.pipeline.preparation.method_setup import MethodSetup
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.recipe import Recipe

__all__ = ["free_rotations"]


def free_rotations(
    source: ModelSource, assignment: Plan, recipe: Recipe, method: MethodSetup
) -> tuple[tuple[str, ...], str]:
    """The rotations that cost no byte, and why others are left out (empty if none is).

    The native container carries both: a tied head stays tied (`ptq.transforms.rotation.online`), and linears rotate
    their inputs. Others carry the residual rotation alone, which is in the weights; there it is free where the head has
    a weight of its own, or where the recipe says that it shall get one. Whether the model's structure allows the
    residual rotation shows when it is tried.

    Args:
        source: the model, before anything is rotated.
        assignment: what will be done to its linears.
        recipe: its container and ``rotate_head``.
        method: what rounds. Where nothing makes up for its errors rotations can do harm (``rtn`` on SmolLM2-135M).
    """
    if not method.compensates:
        return (), f"{method.name} does not solve linears on statistics of their inputs"
    if assignment.outside:
        return (), "the embedding or the head is quantized"
    used = [scheme for scheme in assignment.schemes.values() if scheme is not None]
    others = sorted({scheme.format for scheme in used if scheme.format != "int"})
    if others:
        return (), f"{', '.join(others)} is no integer grid"
    residual = () if is_multimodal(source.skeleton) else ("residual",)
    images = "" if residual else "what images put into the residual stream would not be rotated (--text-only)"
    if _is_native(source, assignment, recipe):
        return (*residual, "down"), images
    if residual and tied_head(source.skeleton) is not None and recipe.rotate_head != "merged":
        return (), (
            "the head is tied to the embedding, and only the native container rotates beside it (--container native; "
            "--rotate-head merged writes a head of its own)"
        )
    return residual, images


def _is_native(source: ModelSource, assignment: Plan, recipe: Recipe) -> bool:
    """Whether the result will be in the native container without being rotated."""
    if recipe.container != "auto":
        return recipe.container == NATIVE.name
    linears = all_linears(source.skeleton)
    name, _ = select_container("auto", assignment.schemes, linears, source.skeleton, key_values_of(recipe))
    return name == NATIVE.name

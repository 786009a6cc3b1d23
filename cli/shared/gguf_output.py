"""``-o FILE.gguf`` of ``ptq quantize``: a result beside the file, and the file from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import OutputError, UsageError

if TYPE_CHECKING:
    from ptq.recipe import Recipe

__all__ = ["gguf_recipe", "is_gguf", "result_folder"]


def is_gguf(out: str | None) -> bool:
    """Whether an output is a GGUF file."""
    return out is not None and out.endswith(".gguf")


def result_folder(out: str) -> Path:
    """The folder of the result that a GGUF file is made from: the file's name without its suffix."""
    return Path(out).with_suffix("")


def gguf_recipe(recipe: Recipe, out: str, *, restart: bool) -> Recipe:
    """The recipe of a result that a GGUF file holds exactly.

    Args:
        recipe: what was asked for.
        out: the file.
        restart: replace it.

    Raises:
        OutputError: the file is there.
        UsageError: a number format without a GGUF type, or another container.
    """
    from ptq.export.gguf.types import exact_type

    if Path(out).exists() and not restart:
        raise OutputError(f"{out} is there: name another file with -o, or replace it with --restart.")
    if recipe.container not in ("auto", "native"):
        raise UsageError(f"--container {recipe.container} says how a folder is written, and {out} is a file.")
    scheme = _stored(recipe.scheme)
    exact_type("every linear", scheme, (256, 256))
    overrides = tuple((pattern, _stored(one)) for pattern, one in recipe.overrides)
    # llama.cpp rotates nothing at run time.
    return dataclasses.replace(recipe, scheme=scheme, overrides=overrides, container="native", rotate_head="merged")


def _stored(scheme: Any) -> Any:
    """GGUF has float16 scales."""
    return dataclasses.replace(scheme, scale_dtype="float16") if scheme.format == "int" else scheme

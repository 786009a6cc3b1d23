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


def gguf_recipe(model: str, recipe: Recipe, out: str, *, restart: bool) -> Recipe:
    """The recipe of a result that a GGUF file holds exactly.

    Args:
        model: a folder, whose tokenizer goes into the file, a file or a name.
        recipe: what was asked for.
        out: the file.
        restart: replace it.

    Raises:
        OutputError: the file is there.
        UsageError: a folder without a tokenizer, a number format without a GGUF type, another container, or anything
            at run time that llama.cpp does not do.
    """
    from ptq.export.gguf.types import exact_type
    from ptq.export.gguf.vocabulary import tokenizer_file

    if Path(out).exists() and not restart:
        raise OutputError(f"{out} is there: name another file with -o, or replace it with --restart.")
    if recipe.container not in ("auto", "native"):
        raise UsageError(f"--container {recipe.container} says how a folder is written, and {out} is a file.")
    if Path(model).is_dir():
        tokenizer_file(Path(model))
    _refuse_run_time(recipe, out)
    scheme = _stored(recipe.scheme)
    exact_type("every linear", scheme, (256, 256))
    overrides = tuple((pattern, _stored(one)) for pattern, one in recipe.overrides)
    # llama.cpp rotates nothing at run time.
    return dataclasses.replace(recipe, scheme=scheme, overrides=overrides, container="native", rotate_head="merged")


def _refuse_run_time(recipe: Recipe, out: str) -> None:
    """llama.cpp rounds and rotates nothing at run time.

    Raises:
        UsageError: the recipe does.
    """
    rotated = [name for name in recipe.rotate if name != "residual"]
    if rotated:
        raise UsageError(
            f"--rotate {','.join(rotated)} with {out}: llama.cpp rotates no inputs. Give --rotate residual, which is "
            "in the weights (a tied head gets a tensor of its own), or none."
        )
    schemes = (recipe.scheme, *(scheme for _, scheme in recipe.overrides))
    if recipe.kv_bits is not None or any(scheme.rounds_input for scheme in schemes):
        raise UsageError(
            f"{out} is a file for llama.cpp, which rounds inputs, keys and values as it likes: leave out --act-bits, "
            "--act-format and --kv-bits."
        )


def _stored(scheme: Any) -> Any:
    """GGUF has float16 scales."""
    return dataclasses.replace(scheme, scale_dtype="float16") if scheme.format == "int" else scheme

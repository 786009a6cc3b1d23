"""The command line that gives a recipe again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ptq.number_formats import find_number_format

__all__ = ["MAX_OVERRIDES", "RECIPE_FILE", "command_words", "public_source", "quoted"]

RECIPE_FILE = "recipe.yaml"
MAX_OVERRIDES = 8
"""Of a recipe with more overrides and ignored patterns, the command names a file."""
_CALIBRATION = {
    "source": ("--calib", "c4"),
    "samples": ("--calib-samples", 128),
    "seqlen": ("--calib-seqlen", 2048),
    "seed": ("--seed", 0),
    "bos": ("--calib-bos", "auto"),
    "template": ("--calib-template", "auto"),
}
"""Flag and default of every field."""


def command_words(recipe: Mapping[str, Any], model: str) -> list[str]:
    """Words of a ``ptq quantize`` that makes the same recipe; with a ``--recipe`` where that would be too long.

    Args:
        recipe: `ptq.recipe.Recipe.record`.
        model: what the command quantizes.
    """
    if len(recipe["overrides"]) + len(recipe["ignore"]) > MAX_OVERRIDES:
        words = ["--recipe", RECIPE_FILE]
    else:
        words = [*_method(recipe), *_scheme(recipe["scheme"]), *_model(recipe), *_data(recipe["calibration"])]
        for row in recipe["overrides"]:
            words += ["--override", f"{row['pattern']}={_override(row)}"]
        for pattern in recipe["ignore"]:
            words += ["--ignore", pattern]
    return ["ptq", "quantize", *words, model, "-o", "OUT"]


def quoted(words: list[str]) -> str:
    """The words as a line for a shell."""
    return shlex.join(words)


def _method(recipe: Mapping[str, Any]) -> Iterator[str]:
    yield from ("--method", recipe["method"])
    for key, value in recipe["options"].items():
        yield from ("-O", f"{key}={value}")


def _scheme(scheme: Mapping[str, Any]) -> Iterator[str]:
    usual = find_number_format(scheme["format"]).defaults
    whole = scheme["format"] == "int"
    if not whole:
        yield from ("--format", scheme["format"])
    if whole or scheme["bits"] != usual["bits"]:
        yield from ("--bits", str(scheme["bits"]))
    if whole or scheme["group_size"] != usual.get("group_size", scheme["group_size"]):
        yield from ("--group-size", str(scheme["group_size"] or 0))
    if scheme["symmetric"] != (True if whole else usual.get("symmetric", True)):
        yield "--sym" if scheme["symmetric"] else "--asym"
    if scheme["scale_dtype"] != "auto":
        yield from ("--scale-dtype", scheme["scale_dtype"])
    if scheme.get("act_format") is not None:
        yield from ("--act-format", scheme["act_format"])
    if scheme["act_bits"] is not None:
        yield from ("--act-bits", str(scheme["act_bits"]))
    if scheme["act_symmetric"]:
        yield "--act-sym"


def _model(recipe: Mapping[str, Any]) -> Iterator[str]:
    recipe = {"rotate_block": None, "rotate_head": "auto", "text_only": False, **recipe}  # earlier releases lack these
    if recipe["kv_bits"] is not None:
        yield from ("--kv-bits", str(recipe["kv_bits"]))
    if recipe["kv_symmetric"]:
        yield "--kv-sym"
    if recipe["rotate"]:
        yield from ("--rotate", ",".join(recipe["rotate"]))
    if recipe["rotate_block"] is not None:
        yield from ("--rotate-block", str(recipe["rotate_block"]))
    if recipe["rotate_head"] != "auto":
        yield from ("--rotate-head", recipe["rotate_head"])
    if recipe["text_only"]:
        yield "--text-only"
    if recipe["compute_dtype"] != "auto":
        yield from ("--dtype", recipe["compute_dtype"])
    if recipe["container"] != "auto":
        yield from ("--container", recipe["container"])


def _data(calibration: Mapping[str, Any]) -> Iterator[str]:
    for field, (flag, usual) in _CALIBRATION.items():
        value = public_source(calibration[field]) if field == "source" else calibration[field]
        if value is not None and value != usual:
            yield from (flag, str(value))


def public_source(source: str) -> str:
    """A calibration source without the folders of the machine it was on; a hub data set as it is."""
    name, at, part = source.partition("@")
    return source if ":" in name else name.replace("\\", "/").rpartition("/")[2] + at + part


def _override(row: Mapping[str, Any]) -> str:
    """The part of ``--override`` after the pattern."""
    whole = row["format"] == "int"
    parts = [str(row["bits"]) if whole else row["format"]]
    if whole or row["group_size"] != find_number_format(row["format"]).defaults.get("group_size", row["group_size"]):
        parts.append(f"g{row['group_size'] or 0}")
    if whole:
        parts.append("sym" if row["symmetric"] else "asym")
    parts.append(f"a-{row['act_format']}" if row.get("act_format") is not None else f"a{row['act_bits'] or 0}")
    return ",".join(parts)

"""From the options of ``ptq quantize`` to a `ptq.Recipe`: a recipe file gives the base, explicit options win."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ptq.api import make_recipe
from ptq.errors import UsageError
from ptq.methods import LayerMethod, find_method, make_config, parse_options
from ptq.recipe import Recipe
from ptq.scheme import Scheme

__all__ = ["build_recipe", "parse_override"]

# Flags that `make_recipe` knows under the same name; the others are translated below.
DIRECT = ("bits", "symmetric", "scale_dtype", "calib", "calib_samples", "calib_seqlen", "seed", "format")


def build_recipe(base: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """``base`` with every flag that was given; a flag that is ``None`` or empty changes nothing.

    Args:
        flags: ``method``, ``bits``, ``group_size`` (0 is per channel), ``symmetric``, ``scale_dtype``, ``calib``,
            ``calib_samples``, ``calib_seqlen``, ``seed``, ``beam``, ``options`` (``KEY=VALUE`` strings),
            ``overrides`` (``PATTERN=bits[,gN][,asym]`` strings), ``ignore``, ``dtype``, ``format``.

    Raises:
        UsageError: an unknown method, option or format, or a value that a field refuses.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    method = find_method(given.get("method", base.method))
    fields: dict[str, Any] = {name: given[name] for name in DIRECT if name in given}
    fields |= {"method": method.name, "options": _options(method, given)}
    if "group_size" in given:
        fields["group_size"] = given["group_size"] or None
    if "dtype" in given:
        fields["compute_dtype"] = given["dtype"]
    recipe = make_recipe(fields, base)
    make_config(method, recipe.options)  # refuses here what would otherwise be refused after the model is opened
    overrides = tuple(parse_override(text, recipe.scheme) for text in given.get("overrides", ()))
    return dataclasses.replace(
        recipe, overrides=overrides + base.overrides, ignore=base.ignore + tuple(given.get("ignore", ()))
    )


def parse_override(text: str, base: Scheme) -> tuple[str, Scheme]:
    """``PATTERN=bits[,gN][,asym|sym]`` as a pattern and ``base`` with these fields changed; ``g0`` is per channel.

    Raises:
        UsageError: the text has another form, or the scheme refuses a value.
    """
    pattern, equals, parts = text.rpartition("=")
    if not equals or not pattern:
        raise _bad_override(text)
    fields: dict[str, Any] = {}
    for part in parts.split(","):
        match = re.fullmatch(r"(?P<bits>\d+)|g(?P<group>\d+)|(?P<sign>a?sym)", part.strip())
        if match is None:
            raise _bad_override(text)
        if match["bits"]:
            fields["bits"] = int(match["bits"])
        elif match["group"]:
            fields["group_size"] = int(match["group"]) or None
        else:
            fields["symmetric"] = match["sign"] == "sym"
    return pattern, dataclasses.replace(base, **fields)


def _bad_override(text: str) -> UsageError:
    return UsageError(f"--override needs PATTERN=bits[,gN][,asym], e.g. '*.down_proj=4,g32,asym'; got {text!r}.")


def _options(method: LayerMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method: ``--beam``, then every ``--option``."""
    texts = {"beam": str(given["beam"])} if "beam" in given else {}
    return parse_options(method, texts | dict(_key_value(text) for text in given.get("options", ())))


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option needs KEY=VALUE, got {text!r}; ptq methods lists the keys.")
    return key.strip().replace("-", "_"), value.strip()

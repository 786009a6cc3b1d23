"""From the options of ``ptq quantize`` to a `ptq.Recipe`: a recipe file gives the base, explicit options win."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from cli.shared.method_flags import METHOD_FLAGS
from ptq.api import make_recipe
from ptq.errors import UsageError
from ptq.methods import METHODS, LayerMethod, WindowMethod, find_method, make_config, parse_options
from ptq.number_formats import FORMATS
from ptq.presets import check_places
from ptq.recipe import CONTAINER_NAMES, Recipe
from ptq.scheme import Scheme

__all__ = ["build_recipe", "parse_override"]

# Flags that `make_recipe` knows under the same name; the others are translated below.
DIRECT = (
    "bits",
    "symmetric",
    "scale_dtype",
    "calib",
    "calib_samples",
    "calib_seqlen",
    "calib_bos",
    "calib_template",
    "seed",
    "format",
    "container",
    "text_only",
    "preset",
    "rotate_block",
    "rotate_head",
)


def build_recipe(base: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """``base`` with every flag that was given; a flag that is ``None`` or empty changes nothing.

    Args:
        flags: ``method``, ``bits``, ``group_size`` (0 is per channel), ``symmetric``, ``scale_dtype``, ``calib``,
            ``calib_samples``, ``calib_seqlen``, ``calib_bos``, ``calib_template``, ``seed``, the names of
            `METHOD_FLAGS`, ``options`` (``KEY=VALUE`` strings), ``overrides`` (see `parse_override`), ``ignore``,
            ``dtype``, ``format``, ``preset``, ``act_format`` (``"none"`` is none), ``act_bits`` and ``kv_bits`` (0 is
            none), ``act_symmetric``, ``kv_symmetric``, ``rotate`` (names, or several with commas),
            ``rotate_block``, ``rotate_head``, ``text_only``.

    Raises:
        UsageError: an unknown method, option or format, or a value that a field refuses.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    # A container's name is taken for one also as --format (`make_recipe`), though gptq is a method's name, too.
    check_places({name: value for name, value in given.items() if name != "format" or value not in CONTAINER_NAMES})
    method = find_method(given.get("method", base.method))
    fields: dict[str, Any] = {name: given[name] for name in DIRECT if name in given}
    fields |= {"method": method.name, "options": _options(method, given)}
    if "group_size" in given:
        fields["group_size"] = given["group_size"] or None
    if "dtype" in given:
        fields["compute_dtype"] = given["dtype"]
    recipe = make_recipe(fields | _dynamic(given), base)
    make_config(method, recipe.options)  # refuses here what would otherwise be refused after the model is opened
    overrides = tuple(parse_override(text, recipe.scheme) for text in given.get("overrides", ()))
    return dataclasses.replace(
        recipe, overrides=overrides + base.overrides, ignore=base.ignore + tuple(given.get("ignore", ()))
    )


def parse_override(text: str, base: Scheme) -> tuple[str, Scheme]:
    """``PATTERN=[format|bits][,gN][,asym|sym][,aN|a-NAME]`` as a pattern and ``base`` with these fields changed.

    A name of a number format brings its defaults along, e.g. ``fp4,g16``; a number alone is a width of integers.
    ``g0`` is per channel; ``a8`` rounds inputs to 8 bits, ``a-nvfp4`` to an activation format, ``a0`` leaves them as
    they are.

    Raises:
        UsageError: the text has another form, or the scheme refuses a value.
    """
    pattern, equals, parts = text.rpartition("=")
    if not equals or not pattern:
        raise _bad_override(text)
    fields: dict[str, Any] = {}
    for part in parts.split(","):
        if part.strip() in FORMATS:
            fields |= {**FORMATS[part.strip()].defaults, "format": part.strip()}
            continue
        match = re.fullmatch(
            r"(?P<bits>\d+)|g(?P<group>\d+)|a(?P<act>\d+)|a-(?P<name>[\w-]+)|(?P<sign>a?sym)", part.strip()
        )
        if match is None:
            raise _bad_override(text)
        if match["bits"]:
            fields["bits"] = int(match["bits"])
            fields.setdefault("format", "int")
        elif match["group"]:
            fields["group_size"] = int(match["group"]) or None
        elif match["act"]:
            fields |= {**_width("act", int(match["act"])), "act_format": None}
        elif match["name"]:
            fields |= {**_width("act", 0), "act_format": match["name"]}
        else:
            fields["symmetric"] = match["sign"] == "sym"
    return pattern, dataclasses.replace(base, **fields)


def _bad_override(text: str) -> UsageError:
    return UsageError(
        f"--override needs PATTERN=bits[,gN][,asym][,aN|a-NAME] or PATTERN=number format[,gN], e.g. "
        f"'*.down_proj=4,g32,asym'; got {text!r}."
    )


def _dynamic(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is rounded or rotated at run time, as fields of scheme and recipe."""
    fields: dict[str, Any] = {}
    for kind in ("act", "kv"):
        fields |= _width(kind, given[f"{kind}_bits"]) if f"{kind}_bits" in given else {}
        fields |= {key: given[key] for key in (f"{kind}_symmetric",) if key in given}
    if given.get("act_format") == "none":
        fields["act_format"] = None
    elif "act_format" in given:  # a recipe's other way to round inputs gives way, unless both are on the command line
        fields = {**_width("act", 0), **fields, "act_format": given["act_format"]}
    elif "act_bits" in given:
        fields["act_format"] = None
    if "rotate" in given:
        names = [name.strip() for text in given["rotate"] for name in text.split(",")]
        fields["rotate"] = () if names == ["none"] else tuple(names)
    return fields


def _width(kind: str, bits: int) -> dict[str, Any]:
    """``0`` and ``16`` are none and take the base's sign along: a sign without bits would be refused."""
    return {f"{kind}_bits": bits} if bits not in (0, 16) else {f"{kind}_bits": None, f"{kind}_symmetric": False}


def _options(method: LayerMethod | WindowMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method: flags of their own, then every ``--option``."""
    own = {field.name for field in dataclasses.fields(method.config)}
    for name in METHOD_FLAGS:
        if name in given and name not in own:
            raise _no_such_option(method, name)
    texts = {name: str(given[name]) for name in METHOD_FLAGS if name in given}
    return parse_options(method, texts | dict(_key_value(text) for text in given.get("options", ())))


def _no_such_option(method: LayerMethod | WindowMethod, name: str) -> UsageError:
    having = [other.name for other in METHODS.values() if name in {f.name for f in dataclasses.fields(other.config)}]
    return UsageError(
        f"{METHOD_FLAGS[name].flag} sets the option {name!r}, which method {method.name!r} does not have. "
        f"Methods that have it: {', '.join(having) or 'none'}; ptq methods lists the options of each."
    )


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option needs KEY=VALUE, got {text!r}; ptq methods lists the keys.")
    return key.strip().replace("-", "_"), value.strip()

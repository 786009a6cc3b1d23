"""Presets: the names under which users of compressed-tensors know pairs of weight and input formats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from calib.errors import folded_name
from ptq.activation_formats import ACTIVATION_FORMATS
from ptq.errors import UsageError, unknown_name
from ptq.methods import METHODS
from ptq.number_formats import FORMATS
from ptq.scheme import Scheme

__all__ = ["PRESETS", "check_places", "find_preset", "with_preset"]


def _integers(bits: int, **more: Any) -> dict[str, Any]:
    return {"format": "int", "bits": bits, "symmetric": True, "group_size": 128, "act_format": None, **more}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "NVFP4": {"format": "nvfp4", "act_format": "nvfp4"},
        "NVFP4A16": {"format": "nvfp4", "act_format": None},
        "MXFP4": {"format": "mxfp4", "act_format": "mxfp4"},
        "MXFP4A16": {"format": "mxfp4", "act_format": None},
        "MXFP8": {"format": "mxfp8", "act_format": "mxfp8"},
        "MXFP8A16": {"format": "mxfp8", "act_format": None},
        "FP8": {"format": "fp8-tensor", "act_format": "fp8-tensor"},
        "FP8_DYNAMIC": {"format": "fp8", "act_format": "fp8"},
        "FP8_BLOCK": {"format": "fp8-block", "act_format": "fp8-block"},
        "W4A16": _integers(4),
        "W8A16": _integers(8),
        "W8A8": {"format": "int8", "act_format": "int8"},
    }
)
"""Fields of `ptq.Scheme` by name."""


def find_preset(name: str) -> Mapping[str, Any]:
    """The scheme's fields of a preset; case does not matter.

    Raises:
        UsageError: there is none of that name; near names are offered.
    """
    if not isinstance(name, str) or name.upper() not in PRESETS:
        raise unknown_name("preset", str(name), PRESETS)
    return PRESETS[name.upper()]


_NAMED = ("format", "bits", "act_format", "act_bits")
"""What the name of a preset says; the rest is open where the format leaves it so."""


def with_preset(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe in which a preset's name stands, with the fields that it stands for.

    Args:
        fields: with ``preset``; what else is given wins where the name leaves it open.

    Raises:
        UsageError: there is no such preset, or a field contradicts its name.
    """
    row = find_preset(fields["preset"])
    scheme = Scheme.of(**row)
    for field in _NAMED:
        if field in fields and fields[field] != getattr(scheme, field):
            raise _contradiction(str(fields["preset"]).upper(), scheme, field, fields[field])
    others = {name: value for name, value in fields.items() if name != "preset"}
    return {"act_bits": None, "act_symmetric": False, **row, **others}


def _contradiction(name: str, scheme: Scheme, field: str, value: object) -> UsageError:
    found = getattr(scheme, field)
    changed = {"format": scheme.format, "bits": scheme.bits, "act_format": scheme.act_format, field: value}
    near = [other for other, row in PRESETS.items() if _is(row, changed)]
    options = "--act-bits, --act-format" if field.startswith("act") else f"--{field}"
    instead = f", or take the preset {near[0]}" if near else ""
    return UsageError(
        f"the preset {name} has {field}={found!r}, and {field}={value!r} ({options}) contradicts it: leave one of them "
        f"out{instead}."
    )


def _is(row: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether a preset is what these fields say."""
    scheme = Scheme.of(**row)
    return all(getattr(scheme, name) == value for name, value in fields.items())


_TABLES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "method": ("a method", METHODS),
    "format": ("a number format", FORMATS),
    "act_format": ("an activation format", ACTIVATION_FORMATS),
    "preset": ("a preset", PRESETS),
}
_ALSO = {
    "method": ("preset", "format"),
    "format": ("preset", "act_format", "method"),
    "act_format": ("preset",),
    "preset": ("format",),
}


def check_places(fields: Mapping[str, Any]) -> None:
    """Check that no name of a method, format or preset was given in the place of another kind.

    Raises:
        UsageError: one was; says where it belongs.
    """
    for field, others in _ALSO.items():
        value = fields.get(field)
        kind, own = _TABLES[field]
        if not isinstance(value, str) or _same(value, own):
            continue
        for other in sorted(
            others, key=lambda name: value not in _TABLES[name][1]
        ):  # as it is written, if there is one
            other_kind, table = _TABLES[other]
            found = _same(value, table)
            if found is not None:
                option = other.replace("_", "-")
                raise UsageError(f"{value!r} is not {kind}: that is {other_kind}, given as --{option} {found}.")


def _same(name: str, table: Mapping[str, object]) -> str | None:
    """The name in a table that differs from ``name`` at most in case, hyphens and underscores."""
    return next((known for known in table if folded_name(known) == folded_name(name)), None)

"""``ptq methods``: what can be plugged in, with a line and the options of each."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import click

__all__ = ["command", "describe_formats", "describe_inputs", "describe_methods"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on stdout (docs/json.md).")
def command(as_json: bool) -> None:
    """List the quantization methods, the formats and the presets. Set options with -O KEY=VALUE in ptq quantize.

    \b
    Examples:
      ptq methods
      ptq quantize --method gptq -O act_order=false MODEL
    """
    from rich.table import Table

    from cli.shared.terminal.screen import console, echo

    rows = describe_methods()
    if as_json:
        echo(json.dumps({"methods": rows, "number_formats": describe_formats(), **describe_inputs()}, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("options and their defaults")
    for row in rows:
        options = ", ".join(f"{option['name']}={_plain(option['default'])}" for option in row["options"])
        table.add_row(row["name"], row["summary"], options)
    formats = Table(box=None, pad_edge=False)
    formats.add_column("format", no_wrap=True)
    formats.add_column("what it stores")
    formats.add_column("methods")
    for row in describe_formats():
        formats.add_row(row["name"], row["summary"], ", ".join(row["methods"]))
    tables = [table, "", formats]
    for title, names in describe_inputs().items():
        more = Table(box=None, pad_edge=False)
        more.add_column(title.replace("_", " ").removesuffix("s"), no_wrap=True)
        more.add_column("what it is")
        for name, text in names.items():
            more.add_row(name, text)
        tables += ["", more]
    console().print(*tables)


def describe_formats() -> list[dict[str, Any]]:
    """The table of number formats as plain data, with the methods that can produce each."""
    from ptq.methods import METHODS
    from ptq.number_formats import FORMATS
    from ptq.scheme import Scheme

    return [
        {
            "name": name,
            "summary": record.summary,
            "defaults": dict(record.defaults),
            "methods": [m.name for m in METHODS.values() if m.unsupported_reason(Scheme.of(name)) is None],
        }
        for name, record in FORMATS.items()
    ]


def describe_inputs() -> dict[str, dict[str, str]]:
    """The formats of activations and the presets as plain data: a line by name."""
    from ptq.activation_formats import ACTIVATION_FORMATS
    from ptq.presets import PRESETS
    from ptq.scheme import Scheme

    return {
        "activation_formats": {name: record.summary for name, record in ACTIVATION_FORMATS.items()},
        "presets": {name: Scheme.of(**fields).describe() for name, fields in PRESETS.items()},
    }


def describe_methods() -> list[dict[str, Any]]:
    """The table of methods as plain data, in its own order."""
    from ptq.methods import METHODS

    return [
        {"name": name, "summary": method.summary, "options": _options(method.config)}
        for name, method in METHODS.items()
    ]


def _options(config: type) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(config)
    defaults = config()
    return [
        {"name": field.name, "type": _type_text(hints[field.name]), "default": getattr(defaults, field.name)}
        for field in dataclasses.fields(config)
    ]


def _type_text(hint: Any) -> str:
    """A type as people write it: ``int``, ``float | None``, ``'corr' | 'row'``."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(hint))
    members = typing.get_args(hint)
    return " | ".join(_type_text(member) for member in members) if members else _type_name(hint)


def _type_name(hint: Any) -> str:
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _plain(value: Any) -> str:
    """A default as it is typed after ``-O KEY=``."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)

"""``ptq inspect``: the report of a quantized checkpoint, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ptq.report import LayerRecord

__all__ = ["SORTS", "command"]

# Largest first for figures, so that what deserves a look is on top; a layer without the figure comes last.
SORTS: dict[str, Callable[[LayerRecord], Any]] = {
    "order": lambda record: 0,
    "name": lambda record: record.name,
    "loss": lambda record: _largest(record.loss),
    "bytes": lambda record: _largest(record.payload_bytes),
    "bits": lambda record: _largest(record.bits_per_weight),
    "alpha": lambda record: _largest(record.figures.get("alpha")),
    "seconds": lambda record: _largest(record.seconds),
}


def _largest(value: float | None) -> float:
    return float("inf") if value is None else -value


@click.command()
@click.argument("out")
@click.option(
    "--sort", type=click.Choice(list(SORTS)), default="order", show_default=True, help="Sort order of the layers."
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Show only the first N layers.")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of every weight file against the report first.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout (docs/json.md).")
def command(out: str, sort: str, top: int | None, verify: bool, as_json: bool) -> None:
    """Show the layers of OUT, a folder written by ptq quantize: scheme, bytes, bits per weight, loss, seconds.

    Of a .gguf file or a model folder of another program: every tensor with its type, bytes and bits.

    \b
    Examples:
      ptq inspect OUT
      ptq inspect OUT --sort loss --top 10
      ptq inspect OUT --verify --json
      ptq inspect MODEL.gguf
    """
    from cli.shared.contents import has_report, show_contents
    from cli.shared.tables import kept_table, layer_table, totals_table, window_table
    from cli.shared.terminal.screen import console, echo
    from ptq.checkpoint.verify import verify_files
    from ptq.report import Report

    if not has_report(out):
        show_contents(out, top=top, as_json=as_json)
        return
    report = Report.load(out)
    verified = verify_files(out) if verify else None
    layers = tuple(sorted(report.layers, key=SORTS[sort]))[:top]
    if as_json:
        echo(dataclasses.replace(report, layers=layers).to_json(), newline=False)
        return
    screen = console()
    screen.print(layer_table(layers), "", totals_table(report))
    if report.windows:
        screen.print("", window_table(report.windows, "learned windows"))
    if report.kept:
        screen.print("", kept_table(report.kept, report.totals["payload_bytes"] + report.totals["kept_bytes"]))
    for warning in report.warnings:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if verified is not None:
        screen.print(f"\n{_verified(verified)}", soft_wrap=True)


def _verified(count: int) -> str:
    return f"{count} weight file{'s are' if count > 1 else ' is'} as the report says"

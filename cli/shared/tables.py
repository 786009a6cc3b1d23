"""A `ptq.Report` as tables: the summary at the end of ``ptq quantize`` and the rows of ``ptq inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cli.shared.terminal.progress import duration
from cli.shared.terminal.rows import Column, NamedRows
from cli.shared.terminal.screen import Screen
from ptq.errors import UsageError
from ptq.report import KeptTensor, LayerRecord, Report

__all__ = ["kept_table", "layer_table", "number", "show_summary", "size", "totals_table", "window_table"]

_FORMATS = 6  # that the summary names
WORST = 5  # layers in the summary; ptq inspect shows all of them


def number(value: float | None, digits: int = 4) -> str:
    """A figure for a table cell, ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(count: float) -> str:
    """Bytes for people, decimal units, e.g. ``"61.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def layer_table(records: Sequence[LayerRecord], title: str | None = None) -> NamedRows:
    """One row per linear: scheme, bytes, real bits per weight, losses, the method's own figures, seconds, notes."""
    figures = list(dict.fromkeys(name for record in records for name in record.figures))  # the methods' own
    headings = ("bytes", "bits/weight", "loss rtn", "loss", *figures, "seconds")
    columns = (Column("scheme", left=True), *map(Column, headings))
    rows = tuple(_layer_cells(record, figures) for record in records)
    return NamedRows("layer", columns, rows, notes="notes", title=title)


def totals_table(report: Report) -> Table:
    """Model, recipe, what multiplies it on this machine, size before and after, time by part."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in _totals(report):
        table.add_row(label, text)
    return table


def window_table(windows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """One row per stage of a learned window: its blocks, loss before and after, what is left of it, steps, seconds."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("blocks", no_wrap=True)
    for heading in ("channels", "loss before", "after", "left", "steps", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("notes")
    for row in windows:
        start, last = row["start"], row["stop"] - 1
        table.add_row(
            f"{start}" if start == last else f"{start}-{last}",
            f"{row['share']:.0%}",
            number(row["loss_before"]),
            number(row["loss_after"]),
            f"{_left(row):.0%}",
            str(row["steps"]),
            f"{row['seconds']:.1f}",
            "; ".join(row["notes"]),
        )
    return table


def _left(row: Mapping[str, Any]) -> float:
    """The share of a window's loss that learning left."""
    return float(row["loss_after"] / row["loss_before"]) if row["loss_before"] else 1.0


def kept_table(kept: Sequence[KeptTensor], total_bytes: int) -> NamedRows:
    """What stayed in full precision, the largest first, with its share of all weight bytes."""
    rows = tuple(
        (tensor.name, size(tensor.bytes), f"{tensor.bytes / max(total_bytes, 1):.1%}", tensor.reason)
        for tensor in sorted(kept, key=lambda item: -item.bytes)
    )
    return NamedRows("tensor", (Column("bytes"), Column("share")), rows, notes="why", title="kept in full precision")


def show_summary(report: Report, out: Path, screen: Screen) -> None:
    """The end of ``ptq quantize``: totals, worst layers, kept tensors, warnings, where it is."""
    measured = [record for record in report.layers if record.loss is not None]
    worst = sorted(measured, key=lambda record: -(record.loss or 0.0))[:WORST]
    screen.print(totals_table(report))
    if report.windows:
        least = sorted(report.windows, key=lambda row: -_left(row))[:WORST]
        screen.print("", window_table(least, "windows that learned least"))
    if worst:
        screen.print("", layer_table(worst, "worst layers by relative output error"))
    if report.kept:
        screen.print("", kept_table(report.kept, _weight_bytes(report)))
    for warning in report.warnings:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    screen.print(f"\nwritten to {out}", soft_wrap=True)


def _layer_cells(record: LayerRecord, figures: Sequence[str]) -> tuple[str, ...]:
    return (
        record.name,
        str(record.scheme["name"]),
        f"{record.payload_bytes:,}",
        f"{record.bits_per_weight:.3f}",
        number(record.loss_rtn),
        number(record.loss),
        *(number(record.figures.get(name), 3) for name in figures),
        f"{record.seconds:.2f}",
        "; ".join(record.notes),
    )


def _totals(report: Report) -> list[tuple[str, str]]:
    totals, recipe = report.totals, report.recipe
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.timing.items())
    before = f"{size(totals['source_bytes'])} {report.model['dtype']}"
    return [
        ("model", f"{report.model['source']} ({report.model['architecture']})"),
        ("method", f"{recipe['method']}, {_formats(report)}"),
        *_at_run_time(report.recipe),
        ("container", f"{report.container}: {report.container_reason}"),
        *_products(report),
        ("bits per weight", f"{totals['bits_per_weight']:.3f} in {len(report.layers)} quantized linears"),
        ("weights", f"{before} -> {size(_weight_bytes(report))} (files {size(totals['file_bytes'])})"),
        ("time", f"{duration(totals['seconds'])} ({parts})" if parts else duration(totals["seconds"])),
    ]


_DEQUANTIZED = ("gptq", "gptq_v2", "awq")
"""Containers for other programs: ptq loads dense weights from them."""


def _products(report: Report) -> list[tuple[str, str]]:
    """What multiplies the packed linears here; nothing for a result that only other programs run."""
    import torch

    from ptq.containers.select import CONTAINERS
    from ptq.runtime.products import product_rows, products_line

    if report.container not in CONTAINERS:
        return []
    if report.container in _DEQUANTIZED:
        return [("products here", "the library's, of weights that are dequantized when the model is loaded")]
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", str(report.model["dtype"])
    try:
        rows = product_rows(report.layers, device, getattr(torch, dtype))
    except UsageError as error:
        return [("products here", str(error))]
    return [("products here", products_line(rows, device, dtype))]


def _formats(report: Report) -> str:
    """The recipe's format, or those that linears have where others were given to them, by how many have each."""
    counts = Counter(str(record.scheme["name"]) for record in report.layers)
    plain = str(report.recipe["scheme"]["name"])
    if len(counts) < 2:
        return next(iter(counts), plain)
    shown = [f"{count} x {name}" for name, count in counts.most_common(_FORMATS)]
    return ", ".join(shown) + (f" and {len(counts) - _FORMATS} more" if len(counts) > _FORMATS else "")


def _at_run_time(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the checkpoint does with activations, where it does anything; inputs are in the scheme of every layer."""
    rows = []
    if recipe.get("kv_bits") is not None:
        sign = "symmetric" if recipe.get("kv_symmetric") else "asymmetric"
        rows.append(("keys and values", f"{recipe['kv_bits']} bits, {sign}, each token and head by itself"))
    if recipe.get("rotate"):
        rows.append(("rotated", ", ".join(recipe["rotate"])))
    return rows


def _weight_bytes(report: Report) -> int:
    return int(report.totals["payload_bytes"] + report.totals["kept_bytes"])

"""What is inside a model that has no report of ptq: every tensor with its type, bytes and bits per weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from calib.checkpoint.files import resolve_model, stored_tensors
from calib.checkpoint.gguf_header import read_gguf_header
from cli.shared.tables import size
from cli.shared.terminal.screen import console, echo
from ptq.report import REPORT_NAME

__all__ = ["has_report", "show_contents"]


class Row(NamedTuple):
    """One tensor."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def has_report(source: str) -> bool:
    """Whether ``ptq inspect`` can show what ptq noted of a model, or there is a folder without any model."""
    path = Path(source)
    return path.suffix != ".gguf" and ((path / REPORT_NAME).exists() or not (path / "config.json").exists())


def show_contents(source: str, *, top: int | None, as_json: bool) -> None:
    """Print the tensors of a ``.gguf`` file or a folder of another program.

    Args:
        source: the file or folder.
        top: only so many tensors, the largest first.
        as_json: plain data instead of a table.

    Raises:
        ModelError: no such model, or files that are damaged.
    """
    path = Path(source)
    entries, rows = _gguf(path) if path.suffix == ".gguf" else _folder(source)
    shown = rows if top is None else sorted(rows, key=lambda row: -row.bytes)[:top]
    total, numbers = sum(row.bytes for row in rows), sum(row.numbers for row in rows)
    if as_json:
        data = {"source": source, **entries, "bytes": total, "numbers": numbers}
        data["tensors"] = [{**row._asdict(), "shape": list(row.shape)} for row in shown]
        echo(json.dumps(data, ensure_ascii=False))
        return
    table = Table("tensor", "type", "shape", "bytes", "bits per number", title=source)
    for row in shown:
        bits = f"{8 * row.bytes / max(1, row.numbers):.3f}"
        table.add_row(row.name, row.type, " x ".join(map(str, row.shape)), f"{row.bytes:,}", bits)
    screen = console()
    screen.print(table)
    for key, value in entries.items():
        screen.print(f"{key}: {value}", soft_wrap=True)
    kinds = Counter[str]()
    for row in rows:
        kinds[row.type] += row.bytes
    screen.print("; ".join(f"{kind} {size(count)}" for kind, count in kinds.most_common()), soft_wrap=True)
    screen.print(f"{len(rows)} tensors, {size(total)}, {8 * total / max(1, numbers):.3f} bits per number of the file")


def _gguf(path: Path) -> tuple[dict[str, Any], list[Row]]:
    header = read_gguf_header(path)
    keys = [key for key in header.entries if key.startswith("general.") or key == "ptq.report"]
    known = {key: header.entries[key] for key in keys}
    return known, [Row(one.name, one.type, one.shape, one.nbytes) for one in header.tensors]


def _folder(source: str) -> tuple[dict[str, Any], list[Row]]:
    folder = resolve_model(source)
    stored = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    entries = {key: config[key] for key in ("model_type", "architectures") if key in config}
    entries |= {
        key: quantization[key] for key in ("quant_method", "format", "bits", "group_size") if key in quantization
    }
    return entries, [Row(name, one.dtype, one.shape, one.nbytes) for name, one in stored.items()]

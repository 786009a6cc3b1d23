"""What is inside a model that has no report of ptq: every tensor with its type, bytes and bits per weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from calib.checkpoint.config import MAX_CONFIG_BYTES
from calib.checkpoint.files import resolve_model, stored_tensors
from calib.checkpoint.gguf_header import read_gguf_header
from calib.checkpoint.json import read_json
from calib.checkpoint.quantized import PackedWeight, packed_weights
from calib.checkpoint.safetensors_header import StoredTensor
from calib.errors import ModelError
from cli.shared.tables import size
from cli.shared.terminal.screen import console, echo
from ptq.report import REPORT_NAME

__all__ = ["has_report", "show_contents"]

_BESIDE = ("g_idx", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point")


class Row(NamedTuple):
    """One tensor, or one weight with all tensors that it is stored as."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        return 8 * self.bytes / max(1, self.numbers)


class Contents(NamedTuple):
    """What is in a file or folder.

    Args:
        entries: Facts beside the tensors, by their name.
        rows: The tensors; the parts of a packed weight are one row.
        file_bytes: Of the weight files, with their headers.
        unit: What the sizes of the rows count.
    """

    entries: dict[str, Any]
    rows: list[Row]
    file_bytes: int
    unit: str


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
    entries, rows, file_bytes, unit = _gguf(path) if path.suffix == ".gguf" else _folder(source)
    shown = rows if top is None else sorted(rows, key=lambda row: -row.bytes)[:top]
    total, numbers = sum(row.bytes for row in rows), sum(row.numbers for row in rows)
    if as_json:
        data = {"source": source, **entries, "bytes": total, "file_bytes": file_bytes, "numbers": numbers}
        data |= {"bits_per_weight": 8 * total / max(1, numbers) if unit == "weight" else None}
        data["tensors"] = [{**row._asdict(), "shape": list(row.shape)} for row in shown]
        echo(json.dumps(data, ensure_ascii=False))
        return
    table = Table("tensor", "type", "shape", "bytes", f"bits per {unit}", title=source)
    for row in shown:
        table.add_row(row.name, row.type, " x ".join(map(str, row.shape)), f"{row.bytes:,}", f"{row.bits:.3f}")
    screen = console()
    screen.print(table)
    for key, value in entries.items():
        screen.print(f"{key}: {value}", soft_wrap=True)
    kinds = Counter[str]()
    for row in rows:
        kinds[row.type] += row.bytes
    screen.print("; ".join(f"{kind} {size(count)}" for kind, count in kinds.most_common()), soft_wrap=True)
    bits = f"{8 * total / max(1, numbers):.3f} bits per {unit}"
    screen.print(f"{len(rows)} tensors, {size(total)} (files {size(file_bytes)}), {bits}")


def _gguf(path: Path) -> Contents:
    header = read_gguf_header(path)
    keys = [key for key in header.entries if key.startswith("general.") or key == "ptq.report"]
    known = {key: header.entries[key] for key in keys}
    rows = [Row(one.name, one.type, one.shape, one.nbytes) for one in header.tensors]
    return Contents(known, rows, path.stat().st_size, "weight")


def _folder(source: str) -> Contents:
    folder = resolve_model(source)
    stored = stored_tensors(folder)
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    quantization = config.get("quantization_config") or {} if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        raise ModelError(f"{folder / 'config.json'} is damaged: it or its quantization_config is no object.")
    entries = {key: config[key] for key in ("model_type", "architectures") if key in config}
    entries |= {
        key: quantization[key] for key in ("quant_method", "format", "bits", "group_size") if key in quantization
    }
    unit = "weight"
    try:
        _, packed = packed_weights(folder, stored, config)
    except ModelError as error:
        packed, unit = [], "stored number"
        entries["note"] = f"packed words are counted as they are stored: {error}"
    rows = _packed_rows(packed, stored)
    inside = {key for weight in packed for key in _own(weight, stored)}
    rows += [Row(name, one.dtype, one.shape, one.nbytes) for name, one in stored.items() if name not in inside]
    files = {one.file for one in stored.values()}
    return Contents(entries, rows, sum(file.stat().st_size for file in files), unit)


def _packed_rows(packed: Iterable[PackedWeight], stored: Mapping[str, StoredTensor]) -> list[Row]:
    """A row per packed weight: what all its tensors take, over the numbers that they stand for."""
    return [
        Row(
            weight.name,
            weight.type,
            weight.shape,
            sum(stored[key].nbytes for key in _own(weight, stored)),
        )
        for weight in packed
    ]


def _own(weight: PackedWeight, stored: Mapping[str, StoredTensor]) -> set[str]:
    """The tensors of a packed weight: its parts, and whatever else lies in its linear but a bias."""
    linear = weight.name.removesuffix("weight")
    beside = {f"{linear}{leaf}" for leaf in _BESIDE}
    return {*weight.parts.values(), *(beside & stored.keys())}

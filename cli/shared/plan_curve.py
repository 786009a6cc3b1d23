"""The curve of budgets of ``ptq plan --pareto``: a table and a picture in the terminal, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.checkpoint.atomic_files import write_file
from calib.errors import UsageError
from cli.shared.terminal.screen import Screen

__all__ = ["CURVE_FILES", "check_curve_file", "curve_lines", "picture_lines", "show_curve", "write_curve"]

CURVE_FILES = (".html", ".json")
"""What the curve can be written as, by the end of the file's name."""
_WIDTH, _HEIGHT = 64, 16  # of the picture, characters
_SMALL = 10e6  # bytes between the smallest and the largest budget below which kilobytes are shown

Row = Mapping[str, Any]


def check_curve_file(path: Path) -> None:
    """Check that a curve can be written there.

    Raises:
        UsageError: the name has another ending.
    """
    if path.suffix.lower() not in CURVE_FILES:
        raise UsageError(
            f"-o {path}: without a target there is no plan, and a curve is written as a page (.html) or as data "
            f"(.json): give a name that ends so, or a target (--target-bpw, --target-size, --max-kl)."
        )


def write_curve(path: Path, page: str, curve: Sequence[Row], uniform: Sequence[Row]) -> None:
    """Write the curve as the page or, for ``.json``, as data.

    Args:
        path: where, with an ending of `CURVE_FILES`.
        page: the page as HTML.
        curve: the best allocations by budget.
        uniform: one format for all linears.
    """
    data = json.dumps({"curve": list(curve), "uniform": list(uniform)}, allow_nan=False, indent=1) + "\n"
    text = data if path.suffix.lower() == ".json" else page
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def show_curve(screen: Screen, curve: Sequence[Row], uniform: Sequence[Row]) -> None:
    """Print the table and the picture."""
    for line in (*curve_lines(curve, uniform), "", *picture_lines(curve, uniform)):
        screen.print(line, soft_wrap=True)


def curve_lines(curve: Sequence[Row], uniform: Sequence[Row]) -> list[str]:
    """The table: a line per budget and per format for all, the smallest first.

    Sizes are in megabytes, or in kilobytes where the budgets of a small model would look alike.
    """
    rows = sorted([*curve, *uniform], key=lambda row: (float(row["bits_per_weight"]), "label" in row))
    sizes = [float(row["file_bytes"]) for row in rows]
    unit, scale, digits = ("kB", 1e3, 1) if max(sizes) - min(sizes) < _SMALL else ("MB", 1e6, 1)
    lines = [f"bits per weight  {f'file {unit}':>12}   predicted KL"]
    for row, size in zip(rows, sizes, strict=True):
        name = f"   all {row['label']}" if "label" in row else ""
        lines.append(
            f"{row['bits_per_weight']:15.3f}  {size / scale:12,.{digits}f}{row['predicted_kl']:15.5g}{name}".rstrip()
        )
    return lines


def picture_lines(curve: Sequence[Row], uniform: Sequence[Row]) -> list[str]:
    """The picture: predicted KL (logarithmic) over bits, ``o`` for allocations and ``x`` for one format for all."""
    points = [(float(r["bits_per_weight"]), float(r["predicted_kl"]), "o") for r in curve]
    points += [(float(r["bits_per_weight"]), float(r["predicted_kl"]), "x") for r in uniform]
    points = [(bits, math.log10(kl), mark) for bits, kl, mark in points if kl > 0]
    if not points:
        return []
    left, right = min(bits for bits, _, _ in points), max(bits for bits, _, _ in points)
    low, high = min(kl for _, kl, _ in points), max(kl for _, kl, _ in points)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for bits, kl, mark in points:
        column = round((bits - left) / (right - left or 1) * (_WIDTH - 1))
        row = round((high - kl) / (high - low or 1) * (_HEIGHT - 1))
        grid[row][column] = mark
    heights = {0: high, _HEIGHT // 2: high - (high - low) * (_HEIGHT // 2) / (_HEIGHT - 1), _HEIGHT - 1: low}
    ends = f"{left:.2f}{right:>{_WIDTH - len(f'{left:.2f}')}.2f}"
    return [
        "predicted KL, nats per token (logarithmic); o: allocated, x: one format for all linears",
        *(
            f"{f'{10 ** heights[number]:.2g}' if number in heights else '':>9} |{''.join(cells).rstrip()}"
            for number, cells in enumerate(grid)
        ),
        f"{'':>9} +{'-' * _WIDTH}",
        f"{'':>11}{ends}",
        f"{'':>11}bits per weight, scales included",
    ]

"""Heat maps of a quantized model, blocks by linears: bits per weight, and relative output error.

A linear's name is split at the first number in it: ``model.layers.3.mlp.experts.7.down_proj`` is ``down_proj`` of block
3. Further numbers count experts, and a cell shows their mean, so that a mixture has as many rows as a dense model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from evals.report.charts.figure import Picture, clean, log_axis, shorten
from evals.report.theme import RAMP, Palette

__all__ = ["LayerGrid", "layer_grid", "layer_pictures"]

_BLOCK = re.compile(r"^(?P<prefix>(?:[^.\d][^.]*\.)*?)(?P<block>\d+)\.(?P<linear>.+)$")
_ROW = 0.2  # inches
_WITH_NUMBERS = 6  # blocks: cells of more are too narrow for text
_LOWEST = 1e-280  # of a logarithmic scale: matplotlib takes anything below 1e-286 for zero


@dataclasses.dataclass(frozen=True)
class LayerGrid:
    """One figure of every linear of a model.

    Args:
        rows: short names of the linears, unique, in the order in which a block has them.
        blocks: the blocks' numbers.
        values: float64 ``[rows, blocks]``, NaN where a block has no such linear or the figure is unknown.
        experts: the most linears that one cell is the mean of.
        outside: names of linears that are in no block; they have no cell.
    """

    rows: tuple[str, ...]
    blocks: tuple[int, ...]
    values: NDArray[np.float64]
    experts: int
    outside: tuple[str, ...]


def layer_grid(layers: Sequence[Mapping[str, Any]], field: str) -> LayerGrid:
    """Arrange a field of a report's layers by linear and block."""
    cells: dict[tuple[str, int], list[float]] = {}
    outside = []
    for layer in layers:
        found = _BLOCK.match(str(layer["name"]))
        if found is None:
            outside.append(str(layer["name"]))
            continue
        linear = found["prefix"] + re.sub(r"(?<=\.)\d+(?=\.)", "*", found["linear"])
        value = layer.get(field)
        cells.setdefault((linear, int(found["block"])), []).append(math.nan if value is None else float(value))
    names = list(dict.fromkeys(linear for linear, _ in cells))
    blocks = sorted({block for _, block in cells})
    values = np.full((len(names), len(blocks)), np.nan)
    for (linear, block), figures in cells.items():
        known = [figure for figure in figures if math.isfinite(figure)]
        values[names.index(linear), blocks.index(block)] = np.mean(known) if known else math.nan
    experts = max(map(len, cells.values()), default=0)
    return LayerGrid(_short_names(names), tuple(blocks), values, experts, tuple(outside))


def layer_pictures(report: Mapping[str, Any], *, key: str = "layers") -> list[Picture]:
    """Bits per weight and, where it was measured, output error of every linear of a ``ptq_report.json``."""
    kinds = (
        ("bits_per_weight", "Bits per weight", "bits per weight, scales included", False),
        ("loss", "Output error", "squared, relative to the output", True),
    )
    pictures = []
    for field, title, unit, logarithmic in kinds:
        grid = layer_grid(report["layers"], field)
        if np.isfinite(grid.values).any():
            pictures.append(_picture(f"{key}-{field.split('_')[0]}", grid, title, unit, logarithmic))
    return pictures


def _picture(key: str, grid: LayerGrid, title: str, unit: str, logarithmic: bool) -> Picture:
    def draw(figure: Figure | SubFigure, palette: Palette) -> None:
        _draw(figure, grid, palette, (title, unit), logarithmic)

    full = f"{title}, block by linear"
    return Picture(key, full, _describe(grid, unit), _caption(grid), 1.35 + _ROW * len(grid.rows), draw)


def _describe(grid: LayerGrid, unit: str) -> str:
    place = np.unravel_index(int(np.nanargmax(grid.values)), grid.values.shape)
    low, high = np.nanmin(grid.values), np.nanmax(grid.values)
    where = f"{grid.rows[place[0]]} of block {grid.blocks[place[1]]}"
    return f"{unit}: from {low:.4g} to {high:.4g}, the largest in {where}; {len(grid.blocks)} blocks."


def _caption(grid: LayerGrid) -> str:
    parts = ["Columns are blocks, rows are linears."]
    if grid.experts > 1:
        parts.append(f"Cells of experts show the mean over up to {grid.experts}.")
    if np.isnan(grid.values).any():
        parts.append("Hatched: no such linear in that block, kept in full precision, or not measured.")
    if grid.outside:
        parts.append(f"In no block, so not shown: {', '.join(shorten(name) for name in grid.outside[:5])}.")
    return " ".join(parts)


def _draw(
    figure: Figure | SubFigure, grid: LayerGrid, palette: Palette, words: tuple[str, str], logarithmic: bool
) -> None:
    """The map, and its scale below."""
    figure.suptitle(words[0], x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes = figure.subplots()
    norm = _norm(grid.values, logarithmic)
    steps = ListedColormap([palette[f"ramp{i}"] for i in range(RAMP)])
    rows, columns = grid.values.shape
    width = 1.0 if columns < 40 else 0.3  # of the lines between cells, points
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid.values), cmap=steps, norm=norm, edgecolors=palette["surface"], linewidth=width
    )
    axes.set(xlim=(0, max(columns, 3)), ylim=(rows, 0), xlabel="block")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(np.arange(rows) + 0.5, [shorten(name, 24) for name in grid.rows])
    shown = range(0, columns, max(1, math.ceil(columns / 16)))
    axes.set_xticks([i + 0.5 for i in shown], [str(grid.blocks[i]) for i in shown])
    _hatch(axes, grid, palette)
    if columns <= _WITH_NUMBERS:
        _numbers(axes, grid, norm, palette)
    bar = figure.colorbar(mesh, ax=axes, location="bottom", fraction=0.08, aspect=38, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(words[1] + (", log scale" if logarithmic else ""))
    if logarithmic:
        log_axis(bar.ax.xaxis, float(norm.vmin or 1), float(norm.vmax or 1))
    else:
        bar.locator = MaxNLocator(nbins=6)
        bar.update_ticks()


def _norm(values: NDArray[np.float64], logarithmic: bool) -> Normalize:
    """The scale: for errors from the smallest above zero to the largest, for bits between whole numbers."""
    finite = values[np.isfinite(values)]
    if not logarithmic:
        low, high = math.floor(finite.min()), math.ceil(finite.max())
        return Normalize(low, max(high, low + 1), clip=True)
    above = finite[finite > 0]
    low, high = (float(above.min()), float(above.max())) if len(above) else (1e-9, 1e-8)
    low = max(low, _LOWEST)
    return LogNorm(low, high if high > 1.05 * low else 1.05 * low, clip=True)


def _hatch(axes: Axes, grid: LayerGrid, palette: Palette) -> None:
    """Mark cells without a value, those of one row that touch in one piece."""
    for row, missing in enumerate(np.isnan(grid.values)):
        ends = np.flatnonzero(np.diff(np.concatenate(([0], missing.astype(int), [0]))))
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            style = {"facecolor": palette["missing"], "edgecolor": palette["grid"], "hatch": "/////", "linewidth": 0}
            axes.add_patch(_box(float(start), float(row), float(end - start), style))


def _box(x: float, y: float, width: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, 1.0, **style)


def _numbers(axes: Axes, grid: LayerGrid, norm: Normalize, palette: Palette) -> None:
    for (row, column), value in np.ndenumerate(grid.values):
        if not math.isnan(value):
            colour = palette["ink" if float(norm(value)) < 0.5 else "surface"]
            place = (column + 0.5, row + 0.52)
            axes.text(*place, f"{value:.3g}", color=colour, ha="center", va="center", fontsize=8)


def _short_names(names: Sequence[str]) -> tuple[str, ...]:
    """As few last components of each name as tell it from the others, ``experts.*.`` shown as a mark."""
    shortened = []
    for name in names:
        parts = [part for part in clean(name).split(".") if part != "*"]
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if sum(other == name or _ends(other, parts[-count:]) for other in names) == 1:
                break
        shortened.append(short)
    double = {name for name, count in Counter(shortened).items() if count > 1}
    return tuple(name if short in double else short for name, short in zip(names, shortened, strict=True))


def _ends(name: str, parts: Sequence[str]) -> bool:
    return [part for part in clean(name).split(".") if part != "*"][-len(parts) :] == list(parts)

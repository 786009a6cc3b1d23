"""Paired differences against the reference as a forest of intervals, and the tail of the divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evals.comparison.conclusions import in_points
from evals.comparison.types import Comparison, Difference
from evals.record import Divergence, Record
from evals.report.charts.figure import Picture, log_axis, shorten
from evals.report.labels import looks
from evals.report.theme import MARKERS, Palette

__all__ = ["PERCENTILES", "difference_pictures", "divergences", "kl_pictures", "unit"]

PERCENTILES = (
    ("median", "kl_median"),
    ("mean", "kl_mean"),
    ("99 %", "kl_p99"),
    ("99.9 %", "kl_p999"),
    ("max", "kl_max"),
)
_ROW = 0.15  # inches
_MOST_ROWS = 44  # of one picture: a page of paper


def unit(measure: str) -> tuple[float, str]:
    """Factor and unit in which a difference of a measure is shown: percentage points or nats."""
    if in_points(measure):
        return 100.0, "percentage points"
    if measure in ("ln ppl", "kl"):
        return 1.0, f"{measure}, nats per token"
    return 1.0, "nats" if measure == "ll_gold" else measure


@dataclasses.dataclass(frozen=True)
class _Forest:
    """Groups (a task or text each) of differences in one unit, and how candidates look."""

    unit: str
    factor: float
    groups: tuple[tuple[Difference, ...], ...]
    looks: Mapping[str, tuple[str, str]]
    reference: str
    higher_is_better: bool

    @property
    def height(self) -> float:
        lines = sum(max(len(group), 2) + 1 for group in self.groups)
        return 1.15 + _ROW * lines + 0.17 * ((len(self.looks) + 1) // 2)


def difference_pictures(comparison: Comparison, *, key: str = "differences") -> list[Picture]:
    """Headline differences from the reference by unit, then by task or text; long lists in several pictures."""
    reference = comparison.candidates[0].label
    found_looks = looks([candidate.label for candidate in comparison.candidates])
    del found_looks[reference]
    chosen = [
        d for d in comparison.differences if d.headline and d.reference == reference and d.candidate in found_looks
    ]
    kinds: dict[tuple[str, float, bool], dict[tuple[str, str], list[Difference]]] = {}
    for found in chosen:
        factor, name = unit(found.measure)
        groups = kinds.setdefault((name, factor, found.higher_is_better), {})
        groups.setdefault((found.target, found.measure), []).append(found)
    forests = [
        _Forest(name, factor, part, found_looks, reference, higher)
        for (name, factor, higher), groups in kinds.items()
        for part in _parts(groups.values())
    ]
    return [_forest_picture(forest, comparison.confidence, f"{key}-{i}") for i, forest in enumerate(forests)]


def _parts(groups: Iterable[Sequence[Difference]]) -> list[tuple[tuple[Difference, ...], ...]]:
    """Groups in runs of at most `_MOST_ROWS` rows."""
    parts: list[list[tuple[Difference, ...]]] = [[]]
    rows = 0
    for group in groups:
        if parts[-1] and rows + len(group) > _MOST_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(tuple(group))
        rows += len(group)
    return [tuple(part) for part in parts]


def _forest_picture(forest: _Forest, confidence: float, key: str) -> Picture:
    rows = [row for group in forest.groups for row in group]
    title = f"Difference from {shorten(forest.reference)}, {forest.unit}"
    said = [f"{r.candidate} on {r.target}: {r.difference * forest.factor:+.3g} ({r.conclusion})" for r in rows]
    better = "right" if forest.higher_is_better else "left"
    caption = f"Better is to the {better}. Bars: {100 * confidence:.4g} % interval of the paired difference. "
    caption += "Filled marks: the difference is significant; open marks: it is not."

    def draw(figure: Figure | SubFigure, palette: Palette) -> None:
        _draw_forest(figure, forest, palette)

    return Picture(key, title, "; ".join(said) + ".", caption, forest.height, draw)


def _draw_forest(figure: Figure | SubFigure, forest: _Forest, palette: Palette) -> None:
    axes = figure.subplots()
    figure.suptitle(
        f"Difference from {shorten(forest.reference, 36)}", x=0.01, ha="left", fontweight="bold", fontsize=10
    )
    axes.axvline(0, color=palette["muted"], linewidth=1.0)
    ticks, names, line = [], [], 0.0
    for group in forest.groups:
        top = line
        for row in group:
            _interval(axes, row, line + (2 - min(len(group), 2)) / 2, forest, palette)
            line += 1
        line = max(line, top + 2)
        ticks.append((top + line - 1) / 2)
        names.append(f"{shorten(group[0].target, 23)}\n{group[0].measure}")
        axes.axhline(line, color=palette["grid"], linewidth=0.6)
        line += 1
    axes.set(ylim=(line - 0.9, -1.0), xlabel=f"difference, {forest.unit}")
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    columns = 2 if max(map(len, forest.looks)) <= 26 else 1
    handles = [_key(label, look, palette) for label, look in forest.looks.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, handletextpad=0.4)


def _interval(axes: Axes, row: Difference, line: float, forest: _Forest, palette: Palette) -> None:
    """A mark, its interval, and the conclusion at the right edge."""
    name, marker = forest.looks[row.candidate]
    colour = palette[name]
    value = row.difference * forest.factor
    bars = None
    if row.low is not None and row.high is not None:
        bars = [[value - row.low * forest.factor], [row.high * forest.factor - value]]
    significant = row.conclusion != "not significant"
    fill = colour if significant else palette["surface"]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "markerfacecolor": fill}
    axes.errorbar([value], [line], xerr=bars, linestyle="none", elinewidth=1.1, **style)
    if significant:
        axes.text(1.01, line, row.conclusion, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)


def _key(label: str, look: tuple[str, str], palette: Palette) -> Line2D:
    return Line2D([], [], color=palette[look[0]], marker=look[1], markersize=5, linewidth=1.1, label=shorten(label, 44))


def divergences(records: Sequence[Record], labels: Sequence[str]) -> dict[str, list[tuple[str, Divergence]]]:
    """By text, every record that has a divergence there: its label and the divergence."""
    found: dict[str, list[tuple[str, Divergence]]] = {}
    for label, record in zip(labels, records, strict=True):
        for text in record.texts:
            if text.divergence is not None:
                target = text.name if text.convention == "segments" else f"{text.name}, {text.convention}"
                found.setdefault(target, []).append((label, text.divergence))
    return found


def kl_pictures(texts: Mapping[str, Sequence[tuple[str, Divergence]]], *, key: str = "kl") -> list[Picture]:
    """The spread of the divergence over tokens, a row per record; texts with nothing above zero are left out."""
    drawn = [(target, rows) for target, rows in texts.items() if any(row.kl_max > 0 for _, row in rows)]
    return [_kl_picture(target, tuple(rows), f"{key}-{i}") for i, (target, rows) in enumerate(drawn)]


def _kl_picture(target: str, rows: Sequence[tuple[str, Divergence]], key: str) -> Picture:
    said = [
        f"{label}: mean {row.kl_mean:.3g}, 99.9 % {row.kl_p999:.3g}, largest {row.kl_max:.3g}" for label, row in rows
    ]
    title = f"Divergence from the base over the tokens of {shorten(target, 60)}"
    caption = "A token's KL(base || model): a small mean can hide a few ruined predictions."
    if any(getattr(row, field) <= 0 for _, row in rows for _, field in PERCENTILES):
        caption += " What is nil has no place on the axis."

    def draw(figure: Figure | SubFigure, palette: Palette) -> None:
        _draw_kl(figure, target, rows, palette)

    return Picture(key, title, "; ".join(said) + ".", caption, 1.3 + 0.24 * max(len(rows), 2), draw)


def _draw_kl(figure: Figure | SubFigure, target: str, rows: Sequence[tuple[str, Divergence]], palette: Palette) -> None:
    axes = figure.subplots()
    figure.suptitle(f"KL of single tokens, {shorten(target, 34)}", x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.set_xscale("log")
    figures = [[getattr(row, field) for _, row in rows] for _, field in PERCENTILES]
    for line, (_, row) in enumerate(rows):
        above = [value for _, field in PERCENTILES if (value := getattr(row, field)) > 0]
        axes.plot([min(above, default=1), max(above, default=1)], [line, line], color=palette["grid"], linewidth=1.5)
    for place, ((name, _), values) in enumerate(zip(PERCENTILES, figures, strict=True)):
        lines = [line for line, value in enumerate(values) if value > 0]
        style: dict[str, Any] = {
            "color": palette[f"series{place}"],
            "marker": MARKERS[place],
            "markersize": 5.5,
            "label": name,
        }
        axes.plot([values[line] for line in lines], lines, linestyle="none", **style)
    known = [value for values in figures for value in values if value > 0]
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="KL(base || model), nats, log scale")
    log_axis(axes.xaxis, min(known), max(known))
    axes.set_yticks(range(len(rows)), [shorten(label, 24) for label, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=5, fontsize=8, handletextpad=0.2, columnspacing=1.0)

"""Quality against real bytes: what a recipe costs and what it gives, with errors, one picture per text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from evals.comparison.types import Candidate, Comparison, Difference, Score
from evals.record import Record, TextResult
from evals.report.charts.figure import Picture, log_axis, shorten
from evals.report.labels import label_records, looks, series_of, with_bases
from evals.report.theme import Palette

__all__ = ["Panel", "Point", "comparison_panels", "quality_pictures", "record_panels"]

_LOG_FROM = 8.0  # ratio of the largest to the smallest value at which an axis becomes logarithmic
_UNITS = {
    "kl": "KL(base || model), nats per token",
    "difference": "difference of ln ppl, nats",
    "ln ppl": "ln perplexity, nats per token",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One model or recipe: bytes of its weights, its figure with an interval, and whether others are held against it.

    ``value`` is ``None`` for a reference that has no figure of its own, as the base of a divergence.
    """

    label: str
    bytes: float
    value: float | None
    low: float | None
    high: float | None
    reference: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """Points of one text. ``measure`` is ``kl``, ``difference`` or ``ln ppl``."""

    target: str
    measure: str
    points: tuple[Point, ...]


def quality_pictures(panels: Sequence[Panel], *, key: str = "quality") -> list[Picture]:
    """A picture for every panel with at least two points."""
    panels = [panel for panel in panels if len(panel.points) > 1]
    return [_picture(panel, f"{key}-{i}") for i, panel in enumerate(panels)]


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """Candidates, their seeds pooled: KL if all but the reference have it, else differences of ln ppl, else ln ppl."""
    targets = dict.fromkeys(s.target for s in comparison.scores if s.measure in ("ln ppl", "kl"))
    return [_candidate_panel(comparison, target) for target in targets]


def _candidate_panel(comparison: Comparison, target: str) -> Panel:
    reference, *others = comparison.candidates
    own = {(s.measure, s.candidate): s for s in comparison.scores if s.target == target}
    against = {
        d.candidate: d
        for d in comparison.differences
        if (d.target, d.measure, d.reference) == (target, "ln ppl", reference.label)
    }
    if others and all(("kl", other.label) in own for other in others):
        points = [_score_point(other, own["kl", other.label]) for other in others]
        return Panel(target, "kl", (_bare(reference), *points))
    if others and all(other.label in against for other in others):
        points = [_difference_point(other, against[other.label]) for other in others]
        zero = dataclasses.replace(_bare(reference), value=0.0)
        return Panel(target, "difference", (zero, *points))
    found = [(c, own["ln ppl", c.label]) for c in comparison.candidates if ("ln ppl", c.label) in own]
    points = [dataclasses.replace(_score_point(c, s), reference=c is reference) for c, s in found]
    return Panel(target, "ln ppl", tuple(points))


def _bare(reference: Candidate) -> Point:
    return Point(reference.label, reference.bytes, None, None, None, reference=True)


def _score_point(candidate: Candidate, score: Score) -> Point:
    """With errors of items and of seeds together."""
    spread = (score.between_seeds or 0.0) / math.sqrt(max(len(candidate.sources), 1))
    error = math.hypot(score.standard_error or 0.0, spread) or None
    return _with_error(candidate.label, candidate.bytes, score.value, error)


def _difference_point(candidate: Candidate, difference: Difference) -> Point:
    low, high = difference.low, difference.high
    return Point(candidate.label, candidate.bytes, difference.difference, low, high)


def _with_error(label: str, size: float, value: float, error: float | None) -> Point:
    """A 95 % interval by the normal distribution."""
    half = None if error is None else 1.96 * error
    return Point(label, size, value, None if half is None else value - half, None if half is None else value + half)


def record_panels(records: Sequence[Record]) -> list[Panel]:
    """The same from single records, by text and convention; only what was measured on the same items is together."""
    everything = with_bases(records)
    bases = {text.divergence.base for record in everything for text in record.texts if text.divergence}
    groups: dict[tuple[str, str], list[tuple[str, Record, TextResult]]] = {}
    for label, record in zip(label_records(everything), everything, strict=True):
        for text in record.texts:
            target = text.name if text.convention == "segments" else f"{text.name}, {text.convention}"
            groups.setdefault((target, text.items.fingerprint), []).append((label, record, text))
    return [_record_panel(target, rows, bases) for (target, _), rows in groups.items()]


def _record_panel(target: str, rows: Sequence[tuple[str, Record, TextResult]], bases: set[str]) -> Panel:
    def is_base(record: Record) -> bool:
        return record.model.fingerprint in bases

    measured = [row for row in rows if not is_base(row[1])]
    if measured and all(text.divergence for _, _, text in measured):
        points = [
            _with_error(label, record.model.bytes, found.kl_mean, found.kl_standard_error)
            for label, record, text in measured
            if (found := text.divergence) is not None
        ]
        bare = [Point(label, r.model.bytes, None, None, None, True) for label, r, _ in rows if is_base(r)]
        return Panel(target, "kl", (*bare, *points))
    points = [_with_error(label, record.model.bytes, t.mean_nll, t.standard_error) for label, record, t in rows]
    marked = [dataclasses.replace(p, reference=is_base(r)) for p, (_, r, _) in zip(points, rows, strict=True)]
    return Panel(target, "ln ppl", tuple(marked))


def _picture(panel: Panel, key: str) -> Picture:
    figures = [f"{p.label}: {p.value:.4g} at {p.bytes / 1e6:.4g} MB" for p in panel.points if p.value is not None]
    title = f"Quality against size on {shorten(panel.target, 60)}"
    caption = "Lower and further left is better. Bars: 95 % interval, which may be smaller than the mark."
    if any(p.reference and p.value is None for p in panel.points):
        caption += " The reference has a size only: its divergence from itself is nil."
    height = 2.7 + 0.17 * math.ceil(len(panel.points) / _columns(panel))

    def draw(figure: Figure | SubFigure, palette: Palette) -> None:
        _draw(figure, panel, palette)

    return Picture(key, title, f"{_UNITS[panel.measure]}. {'; '.join(figures)}.", caption, height, draw)


def _columns(panel: Panel) -> int:
    return 2 if max(len(p.label) for p in panel.points) <= 26 else 1


def _draw(figure: Figure | SubFigure, panel: Panel, palette: Palette) -> None:
    axes = figure.subplots()
    figure.suptitle(
        f"Quality against size, {shorten(panel.target, 30)}", x=0.01, ha="left", fontweight="bold", fontsize=10
    )
    axes.set(xlabel="weights, MB", ylabel=_UNITS[panel.measure])
    found = looks([point.label for point in sorted(panel.points, key=lambda point: not point.reference)])
    if not any(point.reference for point in panel.points):
        found = looks(["", *(point.label for point in panel.points)])
    _join(axes, panel, {label: palette[colour] for label, (colour, _) in found.items()})
    far = [point for point in panel.points if _far(point, panel)]
    for point in panel.points:
        if point not in far:
            colour, marker = found[point.label]
            _mark(axes, point, palette[colour], marker)
    if panel.measure == "difference":
        axes.axhline(0, color=palette["muted"], linewidth=0.8)
    for point in far:
        words = f"{shorten(point.label, 24)} (reference): {point.bytes / 1e6:,.4g} MB \N{RIGHTWARDS ARROW}"
        axes.set_title(words, loc="right", fontsize=8, fontweight="normal")
    _scales(axes, dataclasses.replace(panel, points=tuple(point for point in panel.points if point not in far)))
    figure.legend(loc="outside lower left", ncols=_columns(panel), fontsize=8, handletextpad=0.4, columnspacing=1.0)


def _far(point: Point, panel: Panel) -> bool:
    """Whether a reference without a figure would push the others together at the left."""
    others = [other.bytes for other in panel.points if not other.reference]
    return point.value is None and bool(others) and point.bytes - max(others) > max(others) - min(others)


def _join(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    """A thin line through the points of one method."""
    drawn = [point for point in panel.points if not point.reference]
    for name in dict.fromkeys(series_of(point.label) for point in drawn):
        alike = [p for p in drawn if series_of(p.label) == name]
        points = sorted((p.bytes / 1e6, p.value, p.label) for p in alike if p.value is not None)
        if len(points) > 1:
            xs, ys, labels = zip(*points, strict=True)
            axes.plot(xs, ys, color=colours[labels[0]], linewidth=0.8, alpha=0.5)


def _mark(axes: Axes, point: Point, colour: str, marker: str) -> None:
    label = shorten(point.label, 44)
    size = point.bytes / 1e6
    if point.value is None:
        axes.axvline(size, color=colour, linewidth=1.0, linestyle="--", label=f"{label} (reference)")
        return
    name = f"{label} (reference)" if point.reference else label
    bars = None
    if point.low is not None and point.high is not None:
        bars = [[point.value - point.low], [point.high - point.value]]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5.5, "linestyle": "none"}
    axes.errorbar([size], [point.value], yerr=bars, label=name, elinewidth=1.0, capsize=2.0, **style)


def _scales(axes: Axes, panel: Panel) -> None:
    sizes = [point.bytes / 1e6 for point in panel.points]
    if min(sizes) > 0 and max(sizes) / min(sizes) >= _LOG_FROM:
        axes.set_xscale("log")
        log_axis(axes.xaxis, min(sizes), max(sizes))
    else:
        axes.margins(x=0.12)
    values = [point.value for point in panel.points if point.value is not None]
    if panel.measure == "kl" and min(values) > 0 and max(values) / min(values) >= _LOG_FROM:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(values) / 2, max(max(p.high or p.value or 0 for p in panel.points), max(values)) * 1.6)
        log_axis(axes.yaxis, min(values) / 2, max(values) * 1.6)

"""An allocation of bits: predicted loss against real bits, with one format for all beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure, SubFigure

from evals.report.charts.figure import Picture, log_axis, shorten
from evals.report.theme import Palette

__all__ = ["pareto_picture"]


def pareto_picture(
    curve: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None
) -> Picture:
    """The curve of the best allocations, one format for all linears, and the chosen plan with its measured KL.

    Args:
        curve: rows with ``bits_per_weight`` and ``predicted_kl``.
        uniform: likewise, with ``label``.
        plan: what a plan says about itself; its ``measured_kl`` is shown where it is known.
    """
    words = [f"{row['label']}: {row['predicted_kl']:.4g} at {row['bits_per_weight']:.3g} bits" for row in uniform]

    def draw(figure: Figure | SubFigure, palette: Palette) -> None:
        _draw(figure, palette, curve, uniform, plan)

    caption = "Lower and further left is better. The line is the best that was found at each budget."
    if plan is not None and "measured_kl" in plan:
        caption += " The measured KL is of held-out tokens, with nearest rounding."
    return Picture("pareto", "Predicted KL against real bits", f"{'; '.join(words)}.", caption, 3.2, draw)


def _draw(
    figure: Figure | SubFigure,
    palette: Palette,
    curve: Sequence[Mapping[str, Any]],
    uniform: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any] | None,
) -> None:
    axes = figure.subplots()
    figure.suptitle("Predicted KL against real bits", x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.set(xlabel="bits per weight, scales included", ylabel="KL, nats per token")
    line = [(row["bits_per_weight"], row["predicted_kl"]) for row in curve if row["predicted_kl"] > 0]
    alone = [(row["bits_per_weight"], row["predicted_kl"], row["label"]) for row in uniform if row["predicted_kl"] > 0]
    axes.plot([x for x, _ in line], [y for _, y in line], color=palette["series0"], label="allocated")
    points = [(x, y) for x, y, _ in alone]
    axes.plot([x for x, _ in points], [y for _, y in points], "s", color=palette["series1"], label="one format for all")
    for x, y, label in alone:
        axes.annotate(shorten(label, 12), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
    for key, marker, colour in (("predicted_kl", "o", "series0"), ("measured_kl", "P", "series2")):
        value = None if plan is None else plan.get(key)
        if plan is not None and value is not None and value > 0:
            words = f"this plan, {key.split('_')[0]}"
            axes.plot([plan["bits_per_weight"]], [value], marker, color=palette[colour], markersize=7, label=words)
            points.append((plan["bits_per_weight"], value))
    heights = [y for _, y in (*line, *points)]
    if heights:
        axes.set_yscale("log")
        log_axis(axes.yaxis, min(heights) / 1.2, 1.2 * max(heights))
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)

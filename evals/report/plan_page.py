"""One self-contained HTML page about a plan: bits by block and linear, the curve of budgets, its origins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.report.charts.allocation import pareto_picture
from evals.report.charts.figure import inline_svg
from evals.report.charts.layers import layer_pictures
from evals.report.html import Html, bullets, data_list, page, pictures, table, tiles

__all__ = ["plan_page"]

GENERATOR = "ptq plan"


def plan_page(
    *,
    title: str,
    layers: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]] = (),
    uniform: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as a string of HTML; the same input gives the same bytes.

    Args:
        title: of the page.
        layers: of every linear ``name``, ``format`` and ``bits_per_weight``; empty without a plan.
        about: what a plan says about itself.
        curve: the best allocations by budget, rows with ``bits_per_weight`` and ``predicted_kl``.
        uniform: one format for all, likewise with ``label``.
    """
    drawn = layer_pictures({"layers": layers}) if layers else []
    if curve:
        drawn.append(pareto_picture(curve, uniform, about if layers else None))
    shown = (
        ("bits per weight", "bits_per_weight", "scales included"),
        ("predicted KL", "predicted_kl", "nats per token"),
    )
    more = (("measured KL", "measured_kl", "nats per token, held out"),)
    found = [(name, f"{about[key]:.4g}", below) for name, key, below in (*shown, *more) if key in about]
    rows = [(layer["name"], layer["format"], f"{layer['bits_per_weight']:.3f}") for layer in layers]
    sections = [
        ("Pictures", [pictures((Html(inline_svg(one)), one.caption) for one in drawn)] if drawn else []),
        (
            "Linears",
            [table("Format of every linear", ("linear", "format", "bits per weight"), rows, words=(0, 1))]
            if rows
            else [],
        ),
        ("Where the figures come from", [data_list({k: v for k, v in about.items() if k != "notes"})]),
        ("Notes", [bullets(about["notes"])] if about.get("notes") else []),
    ]
    return page(
        generator=GENERATOR,
        title=title,
        subtitle=str(about.get("model", "")),
        warnings=(),
        tiles=tiles(found) if found else Html(""),
        sections=[(heading, parts) for heading, parts in sections if parts],
    )

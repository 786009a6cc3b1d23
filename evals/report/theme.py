"""Colours and type of pictures and pages: one set of names, light and dark values, and placeholders for drawing.

A picture inside a page is drawn in placeholder colours, which become ``var(--name)``: it then follows the page from
light to dark and onto paper. A picture in a file of its own has the light values. Series are told apart by marker as
well as by colour; the colours are those of Okabe and Ito (Color Universal Design, 2008), lightened for dark pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "DARK",
    "LIGHT",
    "MARKERS",
    "PLACEHOLDERS",
    "RAMP",
    "SERIES",
    "Palette",
    "css_variables",
    "rc_params",
    "to_variables",
]

Palette = Mapping[str, str]
"""Name of a colour -> ``#rrggbb``."""

RAMP = 12  # steps of a heat map, from the page's ground to its ink
SERIES = 8  # colours
MARKERS = "os^vP*Xd"
_LIGHT_SERIES = ("#0072b2", "#d55e00", "#008060", "#b5478b", "#8a6d00", "#2b8cbe", "#5b4a9e", "#6b6b6b")
_DARK_SERIES = ("#62b5f0", "#ff8f55", "#35c9a0", "#ea9acb", "#e3c341", "#9fd8ff", "#b3a5f2", "#b4b4b4")


def _ramp(anchors: Sequence[str]) -> dict[str, str]:
    """`RAMP` colours on the straight lines between anchors."""
    points = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors]
    steps = {}
    for i in range(RAMP):
        place, rest = divmod(i * (len(points) - 1), RAMP - 1)
        low, high = points[place], points[min(place + 1, len(points) - 1)]
        mixed = [round(a + (b - a) * rest / (RAMP - 1)) for a, b in zip(low, high, strict=True)]
        steps[f"ramp{i}"] = "#" + "".join(f"{value:02x}" for value in mixed)
    return steps


LIGHT: Palette = {
    "surface": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "grid": "#d5dae0",
    "missing": "#eceff2",
    **{f"series{i}": colour for i, colour in enumerate(_LIGHT_SERIES)},
    **_ramp(("#eaf3fb", "#a6cee8", "#4a98c9", "#12589f", "#08214f")),
}
DARK: Palette = {
    "surface": "#14181d",
    "ink": "#e8ebee",
    "muted": "#a0a9b3",
    "grid": "#343b44",
    "missing": "#252b32",
    **{f"series{i}": colour for i, colour in enumerate(_DARK_SERIES)},
    **_ramp(("#182738", "#21507f", "#3c86c2", "#8fc6ec", "#e6f4ff")),
}
PLACEHOLDERS: Palette = {name: f"#fe{i:02x}01" for i, name in enumerate(LIGHT)}
_NAMES = {colour: name for name, colour in PLACEHOLDERS.items()}


def css_variables(palette: Palette) -> str:
    """Declarations ``--name: #rrggbb;``, for a rule of a style sheet."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


def to_variables(text: str) -> str:
    """Every placeholder in an SVG as ``var(--name)``."""
    return re.sub(r"#fe[0-9a-f]{2}01\b", lambda match: f"var(--{_NAMES[match[0]]})", text)


def rc_params(palette: Palette, key: str) -> dict[Any, Any]:
    """Settings of matplotlib for one picture. ``key`` makes the ids in its SVG the same each time."""
    ink, muted, grid = palette["ink"], palette["muted"], palette["grid"]
    return {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
        "svg.hashsalt": key,
        "text.parse_math": False,  # a $ in the name of a model is a $
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, and is wide: other fonts need less room
        "font.size": 8.5,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "auto",
        **dict.fromkeys(("text.color", "axes.titlecolor", "axes.labelcolor", "legend.labelcolor"), ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), muted),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), ink),
    }

"""HTML from the templates beside this file; every text is escaped unless it is `Html` already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup as Html

from evals.report.charts.figure import clean
from evals.report.theme import DARK, LIGHT, css_variables

__all__ = ["Html", "bullets", "data_list", "details", "marked", "page", "paragraph", "pictures", "table", "tiles"]


def _printable(value: object) -> object:
    """What cannot be printed becomes a replacement character; markup stays as it is."""
    return value if isinstance(value, Html) else clean(value)


_TEMPLATES = Environment(
    loader=PackageLoader("evals.report", "templates"), autoescape=True, finalize=_printable, trim_blocks=True
)
_PARTS: Any = _TEMPLATES.get_template("parts.html").module


def page(**content: object) -> str:
    """The whole page; the fields of ``page.html`` by name."""
    colours = {"light": Html(css_variables(LIGHT)), "dark": Html(css_variables(DARK))}
    return _TEMPLATES.get_template("page.html").render(colours | content) + "\n"


def table(
    caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]], *, words: Sequence[int] = (0,)
) -> Html:
    """A table that scrolls sideways by itself where it is too wide.

    Args:
        caption: above the table.
        headings: one per column.
        rows: their cells; the first cell of each row is its name, and ``None`` is shown as a dash.
        words: columns of text, aligned left; all others hold figures.
    """
    return Html(_PARTS.table(caption, headings, list(rows), words))


def details(summary: str, *children: object, long: bool = False) -> Html:
    """A part that can be unfolded. On paper it is open, unless it is ``long`` and the reader left it folded."""
    return Html(_PARTS.details(summary, [_printable(child) for child in children], long))


def bullets(items: Iterable[object]) -> Html:
    """A list with bullets."""
    return Html(_PARTS.bullets(list(items)))


def tiles(rows: Iterable[tuple[str, str, str]]) -> Html:
    """The figures at the top: name, value, and a line below the value."""
    return Html(_PARTS.tiles(list(rows)))


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; ``kind`` is a class of the style sheet."""
    return Html(_PARTS.paragraph(text, kind))


def marked(text: str, kind: str) -> Html:
    """Text of a class of the style sheet."""
    return Html(_PARTS.marked(text, kind))


def pictures(figures: Iterable[tuple[Html, str]]) -> Html:
    """Drawings with their captions, in columns."""
    return Html(_PARTS.pictures(list(figures)))


def data_list(data: Mapping[str, Any]) -> Html:
    """JSON data as names and values, inner objects joined by dots; empty values are left out."""
    pairs = [(name, _shown(value)) for name, value in _flat(data, "") if value not in (None, "", [], {}, ())]
    return Html(_PARTS.data_list(pairs))


def _flat(data: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(one) for one in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)

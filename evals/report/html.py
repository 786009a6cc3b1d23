"""HTML from Python: every text is escaped unless it is `Html` already, so that a name can never become markup."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.report.charts.figure import clean

__all__ = ["Cell", "Html", "bullets", "data_list", "details", "join", "table", "tag"]


class Html(str):
    """Text that is markup and may stand in a page as it is."""


Cell = object  # what `str` makes a text of; None is shown as a dash


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not `Html` are escaped. ``class_`` is the attribute ``class``."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{words}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Children one after the other, escaped where needed."""
    return Html("".join(child if isinstance(child, Html) else html.escape(clean(child)) for child in children))


def bullets(items: Iterable[object]) -> Html:
    return tag("ul", *(tag("li", item) for item in items))


def details(summary: str, *children: object, long: bool = False) -> Html:
    """A part that can be unfolded. On paper it is open, unless it is ``long`` and the reader left it folded."""
    body = join([tag("summary", summary), tag("div", *children, class_="folded")])
    return tag("details", body, class_="long" if long else "short")


def table(
    caption: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]], *, words: Sequence[int] = (0,)
) -> Html:
    """A table that scrolls sideways by itself where it is too wide.

    Args:
        caption: above it.
        headings: one per column.
        rows: their cells; the first of each is the row's name.
        words: columns that hold words and are aligned left; the others hold figures.
    """
    head = tag("tr", *(_cell("th", h, i, words, scope="col") for i, h in enumerate(headings)))
    body = [_row(row, words) for row in rows]
    found = tag("table", tag("thead", head), tag("tbody", *body), aria_label=caption)
    scroll = tag("div", found, class_="scroll", role="region", aria_label=caption, tabindex=0)
    return join([tag("p", caption, class_="caption"), scroll])  # outside, so that it does not scroll away


def _row(row: Sequence[Cell], words: Sequence[int]) -> Html:
    first = _cell("th", row[0], 0, words, scope="row")
    return tag("tr", first, *(_cell("td", value, i, words) for i, value in enumerate(row[1:], 1)))


def _cell(name: str, value: Cell, column: int, words: Sequence[int], **attributes: str) -> Html:
    shown = "\N{EN DASH}" if value is None else value
    return tag(name, shown, **attributes, **({"class_": "w"} if column in words else {}))


def data_list(data: Mapping[str, Any]) -> Html:
    """JSON data as names and values, inner objects joined by dots; empty values are left out."""
    pairs = [(name, value) for name, value in _flat(data, "") if value not in (None, "", [], {}, ())]
    return tag("dl", *(join([tag("dt", name), tag("dd", _shown(value))]) for name, value in pairs))


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

"""`Picture`: a drawing with its words, and the two ways to get it on a page or into a file.

Inside a page an SVG takes its colours from the page (`theme`), has ids of its own, and text as text. Everything is
drawn through matplotlib's objects, not through pyplot, so that no figure stays behind.
"""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evals.report.theme import LIGHT, PLACEHOLDERS, Palette, rc_params, to_variables

__all__ = ["WIDTH", "Picture", "clean", "figure_bytes", "inline_svg", "log_axis", "plain_number", "shorten"]

WIDTH = 4.8  # inches: at a phone's width the text is still 9 pixels high
_DPI = 220
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


@dataclasses.dataclass(frozen=True)
class Picture:
    """Something to draw, and its words.

    Args:
        key: letters, digits and dashes; unique on a page, where it begins every id of the SVG.
        title: what is shown, for screen readers and tooltips.
        description: the same in a sentence or two, with the figures that matter.
        caption: how to read the marks.
        height: inches, at a width of `WIDTH`.
        draw: puts it on an empty figure, in the colours of a palette.
    """

    key: str
    title: str
    description: str
    caption: str
    height: float
    draw: Callable[[Figure | SubFigure, Palette], None]


def inline_svg(picture: Picture) -> str:
    """The picture as an ``<svg>`` element for a page that defines the variables of `theme.css_variables`."""
    with _drawing(PLACEHOLDERS, picture.key):
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        picture.draw(figure, PLACEHOLDERS)
        raw = _render(figure, "svg").decode("utf-8")
    return to_variables(_tidy(raw, picture.key, picture.title, picture.description))


def figure_bytes(pictures: Sequence[Picture], kind: str) -> bytes:
    """Pictures below each other as one file on white ground.

    Args:
        pictures: at least one.
        kind: ``"svg"`` or ``"png"``.
    """
    heights = [picture.height for picture in pictures]
    key = pictures[0].key
    with _drawing(LIGHT, key):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor=LIGHT["surface"])
        parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)
        for picture, part in zip(pictures, parts[:, 0], strict=True):
            picture.draw(part, LIGHT)
        raw = _render(figure, kind)
    if kind != "svg":
        return raw
    titles = "; ".join(picture.title for picture in pictures)
    text = _tidy(raw.decode("utf-8"), key, titles, " ".join(picture.description for picture in pictures))
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def clean(text: object) -> str:
    """Text that may stand in XML: what cannot be printed becomes a replacement character."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def shorten(text: object, most: int = 40) -> str:
    """At most ``most`` characters; of a longer text the middle is left out."""
    text = clean(text)
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def plain_number(value: float) -> str:
    """A tick's label without powers of ten where it stays short: ``0.002``, ``50``, ``1e-07``."""
    return f"{value:.12g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"


def log_axis(axis: matplotlib.axis.Axis, low: float, high: float) -> None:
    """Labels of a logarithmic axis from ``low`` to ``high``: 1, 2 and 5 of each decade, of many only the decades."""
    decades = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())
    if decades < 2.2:
        axis.set_minor_locator(LogLocator(subs=(1.0,), numticks=2))


@contextmanager
def _drawing(palette: Palette, key: str) -> Iterator[None]:
    """Our settings and no others; letters that matplotlib's own font lacks are in the reader's."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(rc_params(palette, key))
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font|Matplotlib currently does not support")
        yield


def _render(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    dates = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(stream, format=kind, dpi=_DPI if kind == "png" else 72, metadata=dates)
    return stream.getvalue()


def _tidy(svg: str, key: str, title: str, description: str) -> str:
    """Matplotlib's SVG without prologue, metadata and comments, with ids that begin with ``key``, and with words."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->\n?|<metadata>.*?</metadata>\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{key}-\1"', svg).replace("url(#", f"url(#{key}-")
    svg = svg.replace("*{stroke-linejoin", f"#{key} *{{stroke-linejoin").replace("'DejaVu Sans'", "system-ui")
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda match: _short_numbers(match[0]), svg)
    svg = re.sub(r'\bfill="(#fe[0-9a-f]{4})"', r'style="fill: \1"', svg)  # attributes take no variables
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    words = f'<title id="{key}-title">{_words(title)}</title><desc id="{key}-desc">{_words(description)}</desc>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" id="{key}" {box[0]} role="img"'
    head += f' aria-labelledby="{key}-title {key}-desc">{words}'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _short_numbers(attribute: str) -> str:
    """Coordinates to a hundredth of a point, on one line."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute).replace(" \n", " ").replace("\n", " ")


def _words(text: str) -> str:
    return html.escape(clean(text))

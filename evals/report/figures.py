"""Pictures of records, comparisons and reports, as SVG for a page or as files of their own."""

from __future__ import annotations

from pathlib import Path

from calib.checkpoint.atomic_files import write_file
from calib.errors import UsageError
from evals.comparison.types import Comparison
from evals.report.charts.differences import difference_pictures, divergences, kl_pictures
from evals.report.charts.figure import Picture, figure_bytes, inline_svg
from evals.report.charts.layers import layer_pictures
from evals.report.charts.quality import comparison_panels, quality_pictures, record_panels
from evals.report.page import report_page

__all__ = [
    "SUFFIXES",
    "Picture",
    "comparison_panels",
    "comparison_picture",
    "difference_pictures",
    "divergences",
    "figure_bytes",
    "inline_svg",
    "kl_pictures",
    "layer_pictures",
    "quality_pictures",
    "record_panels",
]

SUFFIXES = (".svg", ".png", ".html")


def comparison_picture(comparison: Comparison, path: Path) -> None:
    """Draw a comparison: quality against bytes, then differences from the reference, below each other.

    Args:
        comparison: with at least one difference or two models of known size.
        path: a ``.svg`` or ``.png`` file on white ground, or an ``.html`` page with the tables as well.

    Raises:
        UsageError: another suffix, or nothing to draw.
        OutputError: the file cannot be written; a file that was there is as before.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"cannot draw into {path}: a name that ends in {', '.join(SUFFIXES)} says what to write.")
    content = _page(comparison) if suffix == ".html" else _image(comparison, suffix[1:])
    write_file(path, lambda temporary: temporary.write_bytes(content))


def _page(comparison: Comparison) -> bytes:
    return report_page(None, (), comparison, title="Comparison").encode()


def _image(comparison: Comparison, kind: str) -> bytes:
    pictures = [*quality_pictures(comparison_panels(comparison)), *difference_pictures(comparison)]
    if not pictures:
        raise UsageError("there is nothing to draw: the comparison has no text and no difference from the reference.")
    return figure_bytes(pictures, kind)

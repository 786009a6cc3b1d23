"""``ptq compare``: paired differences of evaluations, their significance, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calib.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cli.shared.terminal.rows import NamedRows
    from cli.shared.terminal.screen import Screen
    from evals.comparison.types import Comparison, Difference, Score

__all__ = ["PICTURES", "command"]

PICTURES = (".svg", ".png", ".html")


@click.command()
@click.argument("records", nargs=-1, required=True, metavar="BASE.json RECORD.json ...")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Display name of a record; give one per record, in the same order.",
)
@click.option(
    "--shared", is_flag=True, help="Compare only the items that all records share, if the records differ in items."
)
@click.option(
    "--all", "everything", is_flag=True, help="Show all metrics, not only the usual one of each text or task."
)
@click.option(
    "--confidence", default=0.95, show_default=True, metavar="LEVEL", help="Confidence level of the intervals."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the comparison as JSON on stdout (docs/json.md) and nothing else."
)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write charts to a .svg, .png or .html file."
)
def command(
    records: tuple[str, ...],
    labels: tuple[str, ...],
    shared: bool,
    everything: bool,
    confidence: float,
    as_json: bool,
    out: str | None,
) -> None:
    """Compare evaluations of models on the same items; the first record is the reference.

    Records are files that ptq eval wrote with -o. Those of one recipe with different calibration seeds are pooled. One
    record alone is compared with the base that it was measured against. See docs/comparing.md.

    \b
    Examples:
      ptq compare base.json gptq.json coreq.json
      ptq compare base.json seed0.json seed1.json seed2.json --all
      ptq compare a.json b.json --label full --label "3 bits" -o differences.svg
    """
    from cli.shared.terminal.screen import console, echo

    _check_target(out)
    from evals.comparison.compare import compare
    from evals.record import read_record

    found = compare(
        [read_record(path) for path in records], labels=labels or None, confidence=confidence, shared=shared
    )
    if out is not None:
        from evals.report.figures import comparison_picture

        comparison_picture(found, Path(out))
    if as_json:
        echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found, everything, console())


def _check_target(out: str | None) -> None:
    if out is None:
        return
    if Path(out).suffix.lower() not in PICTURES:
        raise UsageError(f"{out} is no picture that can be written; end its name in {', '.join(PICTURES)}.")
    if not Path(out).resolve().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {Path(out).resolve().parent}; create it first.")


def _show(found: Comparison, everything: bool, screen: Screen) -> None:
    for table in _tables(found, everything):
        screen.print(table, "")
    if any(one.headline and one.conclusion == "not significant" for one in found.differences):
        screen.print("n.s.: not significant, which does not mean that there is no difference\n")
    for sentence in found.sentences:
        screen.print(sentence)
    if found.notes:
        screen.print()
    for note in found.notes:
        screen.print(f"note: {note}", style="yellow")


def _tables(found: Comparison, everything: bool) -> list[NamedRows]:
    """One table for each target and measure."""
    names = dict.fromkeys((one.target, one.measure) for one in found.scores if one.headline or everything)
    return [_table(found, target, measure) for target, measure in names]


def _table(found: Comparison, target: str, measure: str) -> NamedRows:
    from cli.shared.terminal.rows import Column, NamedRows

    scores = [one for one in found.scores if (one.target, one.measure) == (target, measure)]
    differences = [one for one in found.differences if (one.target, one.measure) == (target, measure)]
    flips = any(one.flips is not None for one in differences)
    headings = (
        "value",
        "difference",
        f"{100 * found.confidence:.4g} % interval",
        "p",
        *(("lost/won",) if flips else ()),
    )
    rows = []
    for row in _rows(found, scores, differences):
        *figures, changed, conclusion = row
        rows.append((*figures, *((changed,) if flips else ()), conclusion))
    columns = (*map(Column, headings), Column("conclusion", left=True))
    return NamedRows("model", columns, tuple(rows), title=_title(target, measure, differences))


def _title(target: str, measure: str, differences: Sequence[Difference]) -> str:
    if not differences:
        return f"{target}: {measure}"
    first = differences[0]
    draws = "" if first.blocks == first.items else f", {first.blocks:,} independent draws"
    return f"{target}: {measure}, {first.items:,} items{draws}"


def _rows(
    found: Comparison, scores: Sequence[Score], differences: Sequence[Difference]
) -> list[tuple[str, str, str, str, str, str, str]]:
    """A row for each candidate with its difference from the reference, then one for each other pair."""
    reference = found.candidates[0].label
    against = {one.candidate: one for one in differences if one.reference == reference}
    rows = []
    for one in scores:
        rows.append((one.candidate, _value(one), *_cells(against.get(one.candidate))))
    for other in differences:
        if other.reference != reference:
            rows.append((f"{other.candidate} - {other.reference}", "", *_cells(other)))
    return rows


def _cells(one: Difference | None) -> tuple[str, str, str, str, str]:
    """Difference, interval, p, flips, conclusion."""
    from evals.comparison.conclusions import figure, p_words

    if one is None:
        return "", "", "", "", ""
    interval = "-"
    if one.low is not None and one.high is not None:
        interval = f"[{figure(one, one.low, sign=True)}, {figure(one, one.high, sign=True)}]"
    p = one.p_adjusted if one.headline else one.p_value
    shown = "-" if p is None else p_words(p).removeprefix("p ").removeprefix("= ")
    flips = "-" if one.flips is None else f"{_count(one.flips.lost)}/{_count(one.flips.won)}"
    return figure(one, one.difference, sign=True), interval, shown, flips, _conclusion(one)


def _conclusion(one: Difference) -> str:
    if not one.headline:
        return "-"
    return "n.s." if one.conclusion == "not significant" else one.conclusion


def _value(one: Score) -> str:
    from evals.comparison.conclusions import in_points

    scale, digits = (100.0, 1) if in_points(one.measure) else (1.0, 4)
    error = "" if one.standard_error is None else f" +- {one.standard_error * scale:.{digits}f}"
    return f"{one.value * scale:.{digits}f}{error}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"

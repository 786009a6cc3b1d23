"""``ptq report``: one self-contained HTML page about a quantized model and its evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.errors import OutputError, PtqError, UsageError

if TYPE_CHECKING:
    from evals.comparison.types import Comparison
    from evals.record import Record

__all__ = ["command"]

_HEAD = 1024  # bytes in which a page of ours says that it is one


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="[OUT] [RECORD.json ...]")
@click.option(
    "-o", "--out", "target", default="report.html", show_default=True, metavar="FILE", help="HTML file to write."
)
@click.option("--title", metavar="TEXT", help="Title of the page; the model's name by default.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a summary of what was written as JSON on stdout (docs/json.md)."
)
def command(sources: tuple[str, ...], target: str, title: str | None, as_json: bool) -> None:
    """Write one HTML page that opens without a network, is readable in light and dark, and prints.

    OUT is a folder that ptq quantize wrote: its layers, sizes and origin. Records are files of ptq eval. Of two or more
    the first is the reference of a comparison; where they cannot be compared the page says why. OUT may be left out.

    \b
    Examples:
      ptq report OUT
      ptq report OUT base.json out.json -o out.html
      ptq report base.json gptq.json coreq.json --title "Three bits"
    """
    folder, files = _sort(sources)
    path = Path(target)
    _check_target(path)
    from calib.checkpoint.atomic_files import write_file
    from cli.shared.tables import size
    from cli.shared.terminal.screen import echo
    from evals.report.page import report_page

    report = None if folder is None else _report(folder)
    records = _records(files)
    comparison, problem = _compare(records)
    page = report_page(report, records, comparison, title=title or _title(folder, report), notes=problem)
    content = page.encode()
    write_file(path, lambda temporary: temporary.write_bytes(content))
    if as_json:
        found = {"report": target, "bytes": len(content), "records": len(records), "compared": comparison is not None}
        echo(json.dumps(found | {"notes": problem}))
        return
    for note in problem:
        echo(f"note: {note}", color="yellow", err=True)
    echo(f"written to {target} ({size(len(content))})")


def _sort(sources: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder, if there is one, and the records."""
    files = [source for source in sources if Path(source).suffix.lower() == ".json" or Path(source).is_file()]
    folders = [source for source in sources if source not in files]
    if len(folders) > 1:
        raise UsageError(
            f"a page is about one quantized model, but {' and '.join(folders)} are not .json files. Give one folder, "
            "and the records of the others from ptq eval -o."
        )
    return (folders[0] if folders else None), files


def _check_target(path: Path) -> None:
    """Refuse a folder that is missing and a file that is not a page of ours."""
    from evals.report.page import GENERATOR

    if not path.resolve().parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.resolve().parent}; create it first.")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error
    if f'content="{GENERATOR}"'.encode() not in head:
        raise OutputError(f"{path} is there and is not a page of ptq report: move it away, or name another with -o.")


def _report(folder: str) -> dict[str, Any]:
    from ptq.report import Report

    return Report.load(folder).to_dict()


def _records(files: Sequence[str]) -> list[Record]:
    from evals.record import read_record

    return [read_record(file) for file in files]


def _compare(records: Sequence[Record]) -> tuple[Comparison | None, list[str]]:
    """The comparison, or why there is none; a single record is compared with the base inside it."""
    from evals.comparison.compare import compare

    if not records or (len(records) == 1 and records[0].base is None):
        return None, []
    try:
        return compare(records), []
    except PtqError as error:
        return None, [f"The records are shown apart, because they cannot be compared: {error}"]


def _title(folder: str | None, report: dict[str, Any] | None) -> str:
    if folder is None or report is None:
        return "Evaluation"
    scheme = report["recipe"]["scheme"]
    return f"{Path(folder).resolve().name}: {report['recipe']['method']}, {scheme['name']}"

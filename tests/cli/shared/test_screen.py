"""What is printed is what the user named, in any encoding, at any width, and into a pipe that nobody reads."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cli
from cli.main import COMMANDS, main
from cli.shared.eval_tables import show
from cli.shared.tables import show_summary
from cli.shared.terminal.bar import counter_bars
from cli.shared.terminal.rows import Column, NamedRows
from cli.shared.terminal.screen import CLOSED_PIPE, Screen, console, echo
from ptq.report import KeptTensor, Report
from tests.support.record_factory import made_divergence, made_record, made_task, made_text

HOSTILE = "a:train:b[/]x[bold]y[/bold]:fire:[red]z"


@contextmanager
def stdout_is(stream: io.TextIOWrapper) -> Iterator[None]:
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before


def lines_of(rows: NamedRows, width: int) -> list[str]:
    text = io.StringIO()
    Screen(file=text, width=width).print(rows)
    return [line.rstrip() for line in text.getvalue().splitlines()]


# -- literally ---------------------------------------------------------------------------------------------------------


def test_every_place_shows_names_literally(small_report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    screen = console()
    text = made_text([1.0, 2.0], name=f"text {HOSTILE}", divergence=made_divergence("f"))
    task = made_task([1, 0, 1], name=f"task {HOSTILE}")
    base = made_record(f"base {HOSTILE}", [text, task])
    record = made_record(f"model {HOSTILE}", [text, task], base=base)
    show(dataclasses.replace(record, notes=(f"note {HOSTILE}",)), screen)
    shown = capsys.readouterr().out
    for what in ("text", "task", "base", "model", "note"):
        assert f"{what} {HOSTILE}" in shown
    named = {
        "model": small_report.model | {"source": f"source {HOSTILE}"},
        "kept": (KeptTensor(f"kept {HOSTILE}", f"why {HOSTILE}", 3),),
        "warnings": (f"warning {HOSTILE}",),
    }
    show_summary(dataclasses.replace(small_report, **named), Path(f"out {HOSTILE}"), screen)
    screen.print(NamedRows("layer", (Column(f"heading {HOSTILE}"),), ((f"name {HOSTILE}", f"cell {HOSTILE}"),)))
    shown = capsys.readouterr().out
    for what in ("source", "kept", "why", "warning", "out", "heading", "name", "cell"):
        assert f"{what} {HOSTILE}" in shown


def test_bars_show_names_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(
        "cli.shared.terminal.bar.console", lambda stderr: Screen(file=text, force_terminal=True, width=160)
    )
    with counter_bars() as step:
        step(f"text {HOSTILE}", 1, 2)
    assert f"text {HOSTILE}" in text.getvalue()


def test_errors_are_shown_literally(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{HOSTILE}\x1b[2J"]) == 6
    shown = capsys.readouterr().err
    assert HOSTILE in shown
    assert "\x1b" not in shown


def test_no_other_place_makes_a_console_or_reads_markup() -> None:
    """The one place is `cli.shared.terminal.screen`: nothing else in the package makes a console, reads markup or calls
    click.echo."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        if path.name == "screen.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("Console", "print", "click.echo", "click.secho", "Text.from_markup"), path
            if called == "TextColumn":
                assert [ast.unparse(k.value) for k in node.keywords if k.arg == "markup"] == ["False"] or (
                    isinstance(node.args[0], ast.Constant) and "{" not in str(node.args[0].value)
                ), path


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp437"])
def test_any_encoding_takes_any_name(encoding: str, small_report: Report) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    named = dataclasses.replace(small_report, warnings=("train \U0001f68b, half \ud83d, caf\xe9, \x1b[2J",))
    with stdout_is(stream):
        show_summary(named, Path("OUT"), console())
        echo("\U0001f68b \ud83d")
        stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert ("caf\xe9" in shown) == (encoding != "ascii")
    assert "half ?," in shown
    assert "\\x1b[2J" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_ascii(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.isascii()


# -- closed pipes ------------------------------------------------------------------------------------------------------


@contextmanager
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_pipe_ends_a_command_quietly(
    more: list[str], tmp_path: Path, small_report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ptq_report.json").write_text(small_report.to_json())
    with closed_pipe() as stream, stdout_is(stream):
        assert main(["inspect", str(tmp_path), *more]) == CLOSED_PIPE
    assert capsys.readouterr().err == ""


def test_the_record_is_there_when_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made_record("MODEL", [made_text([1.0, 2.0])])
    monkeypatch.setattr("cli.eval._evaluate", lambda options: record)
    for name, more in (("a.json", []), ("b.json", ["--json"])):
        with closed_pipe() as stream, stdout_is(stream):
            assert main(["eval", "MODEL", "-o", str(tmp_path / name), *more]) == CLOSED_PIPE
        assert json.loads((tmp_path / name).read_text())["model"]["source"] == "MODEL"


def test_a_record_that_cannot_be_written_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = made_record("MODEL", [made_text([1.0, 2.0])])
    monkeypatch.setattr("cli.eval._evaluate", lambda options: record)
    (tmp_path / "a.json.tmp").mkdir()
    assert main(["eval", "MODEL", "-o", str(tmp_path / "a.json")]) == 6
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert "cannot write" in shown.err


def test_progress_into_a_closed_pipe_does_not_cost_the_run() -> None:
    with closed_pipe() as stream:
        screen = Screen(file=stream, stderr=True)
        screen.print("block 1/2")
        screen.print("block 2/2")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_stdout_is_a_sentence(
    tmp_path: Path, small_report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ptq_report.json").write_text(small_report.to_json())
    with open("/dev/full", "w", encoding="utf-8") as stream, stdout_is(stream):
        assert main(["inspect", str(tmp_path)]) == 6
    assert "cannot write to standard output: No space left on device" in capsys.readouterr().err


# -- widths ------------------------------------------------------------------------------------------------------------


LONG = "model.language_model.decoder.layers.{}.feed_forward.mixture.experts.17.gate_up_projection"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_names_and_figures_are_whole_at_any_width(width: int) -> None:
    rows = NamedRows(
        "layer",
        (Column("scheme", left=True), *map(Column, ("bytes", "bits/weight", "loss", "alpha"))),
        tuple(
            (LONG.format(i), "int3 asym g64 a8", "12,345,678", "3.250", f"0.{i}25", "-", f"sentence {i} " * 9)
            for i in range(3)
        ),
        notes="notes",
        title="title",
    )
    shown = lines_of(rows, width)
    assert max(map(len, shown)) <= width
    assert "…" not in "".join(shown)
    joined = "".join(line.strip() for line in shown)
    for i in range(3):
        assert LONG.format(i) in joined
        assert f"0.{i}25" in joined
        assert "".join(f"sentence {i} " * 9).replace(" ", "") in joined.replace(" ", "")


def test_a_row_is_one_line_where_it_fits_and_empty_columns_go_first() -> None:
    rows = NamedRows("layer", (Column("loss"), Column("seconds")), (("name", "-", "1.0"),))
    assert [line.split() for line in lines_of(rows, 40)] == [["layer", "loss", "seconds"], ["name", "-", "1.0"]]
    assert [line.split() for line in lines_of(rows, 16)] == [["layer", "seconds"], ["name", "1.0"]]
    assert lines_of(rows, 12) == ["layer", "  seconds", "name", "      1.0"]


def test_cells_of_several_lines_stay_beside_each_other() -> None:
    rows = NamedRows("task", (Column("metric", left=True), Column("value")), (("a" * 20, "acc\nacc_norm", "1\n2"),))
    assert lines_of(rows, 20)[-2:] == ["  acc           1", "  acc_norm      2"]

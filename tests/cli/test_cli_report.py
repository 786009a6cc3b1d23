"""``ptq report``: what it takes, what it writes, and what it will not overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from evals.record import Record
from ptq.report import REPORT_NAME, Report
from tests.support.record_factory import made_record, made_task, made_text, recipe


@pytest.fixture
def folder(tmp_path: Path, small_report: Report, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with OUT, base.json, out.json and other.json (of other items) in it."""
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / REPORT_NAME).write_text(small_report.to_json())
    nll = [20.0, 25.0, 22.0, 27.0]
    write(tmp_path / "base.json", made_record("full", [made_text(nll), made_task([1, 1, 0, 1])]))
    worse = [one + 1 + 0.1 * i for i, one in enumerate(nll)]
    write(tmp_path / "out.json", made_record("OUT", [made_text(worse), made_task([1, 0, 0, 1])], **recipe()))
    write(tmp_path / "other.json", made_record("elsewhere", [made_text(nll, first=50)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, record: Record) -> None:
    path.write_text(json.dumps(record.to_dict()))


def test_a_folder_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "OUT"]) == 0
    assert capsys.readouterr().out.startswith("written to report.html (")
    page = (folder / "report.html").read_text()
    assert "<h1>OUT: coreq, int3 sym g64</h1>" in page
    assert "model.layers.1.self_attn.q_proj" in page
    assert sorted(path.name for path in folder.iterdir()) == [
        "OUT",
        "base.json",
        "other.json",
        "out.json",
        "report.html",
    ]


def test_with_records_there_is_a_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "OUT", "base.json", "out.json", "-o", "a.html", "--title", "My <title>", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    page = (folder / "a.html").read_text()
    assert found == {"report": "a.html", "bytes": len(page.encode()), "records": 2, "compared": True, "notes": []}
    assert "<h1>My &lt;title&gt;</h1>" in page
    assert "Significant differences" in page


def test_records_alone_in_any_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "record").write_text((folder / "base.json").read_text())  # a file is a record, whatever its name
    assert main(["report", "record", "out.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"] is True
    assert "Every linear" not in (folder / "report.html").read_text()
    assert main(["report", "base.json", "OUT", "out.json"]) == 0
    assert "Every linear" in (folder / "report.html").read_text()


def test_records_that_cannot_be_compared_are_shown_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "base.json", "other.json"]) == 0
    assert "cannot be compared" in capsys.readouterr().err
    page = (folder / "report.html").read_text()
    assert "The records are shown apart, because they cannot be compared" in page
    assert "elsewhere" in page
    assert "Significant differences" not in page


def test_one_record_without_a_base_is_no_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "out.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["compared"], found["notes"]) == (False, [])


def test_only_a_page_of_ours_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "OUT"]) == 0
    assert main(["report", "OUT"]) == 0
    capsys.readouterr()
    (folder / "mine.html").write_text("<!doctype html>my diary")
    assert main(["report", "OUT", "-o", "mine.html"]) == 6
    assert "mine.html is there and is not a page of ptq report" in capsys.readouterr().err
    assert (folder / "mine.html").read_text() == "<!doctype html>my diary"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 6, "nowhere has no ptq_report.json"),
        (["nowhere.json"], 6, "nowhere.json"),
        (["OUT", "OTHER"], 2, "OUT and OTHER"),
        (["OUT", "-o", "no/such/page.html"], 6, "there is no folder"),
        (["OUT", "-o", "OUT"], 6, "cannot write OUT"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_input(
    folder: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main(["report", *arguments]) == code
    assert words in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_damaged_record_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.json").write_text("{}")
    assert main(["report", "OUT", "bad.json", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "DataError"
    assert "bad.json" in error["message"]

"""``ptq inspect`` and ``ptq methods``: the tables and their JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.inspect import SORTS
from cli.main import main
from cli.shared.tables import number, size
from ptq.methods import METHODS
from ptq.report import REPORT_NAME, Report


@pytest.fixture
def folder(tmp_path: Path, small_report: Report) -> Path:
    (tmp_path / REPORT_NAME).write_text(small_report.to_json())
    return tmp_path


def shown_order(text: str, report: Report) -> list[int]:
    """Indices of the report's layers in the order in which ``text`` names them."""
    return sorted(range(len(report.layers)), key=lambda i: text.index(report.layers[i].name))


def test_a_row_for_every_layer(folder: Path, small_report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if small_report.layers[0].name in line)
    assert row.split() == [
        small_report.layers[0].name,
        *["int3", "sym", "g64", "1,664", "3.250", "0.25", "0.125", "0.5", "0.5", "0.50"],
    ]
    bare = next(line for line in shown.splitlines() if small_report.layers[1].name in line)
    assert bare.split()[1:] == ["int3", "sym", "g64", "1,664", "3.250", "-", "-", "-", "-", "0.50", "fp64", "Cholesky"]
    assert "model.embed_tokens" in shown
    assert "warning: one block is small" in shown


@pytest.mark.parametrize(
    ("sort", "order"), [("order", [0, 1, 2]), ("name", [1, 0, 2]), ("loss", [2, 0, 1]), ("alpha", [0, 2, 1])]
)
def test_sorting(
    sort: str, order: list[int], folder: Path, small_report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), "--sort", sort]) == 0
    assert shown_order(capsys.readouterr().out, small_report) == order
    assert main(["inspect", str(folder), "--sort", sort, "--json"]) == 0
    names = [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]]
    assert names == [small_report.layers[i].name for i in order]


def test_top_keeps_the_first_of_the_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--sort", "loss", "--top", "1", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["name"] == "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_works_on_missing_figures(sort: str, folder: Path) -> None:
    assert main(["inspect", str(folder), "--sort", sort]) == 0


def test_a_folder_that_is_not_ours_is_an_output_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 6
    assert "was not written by ptq quantize" in capsys.readouterr().err


def test_methods_lists_every_method_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"\n{name} " in shown
        assert method.summary.split(", ")[0][:40] in shown  # long ones are wrapped
    assert "beam=1" in shown


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["name"] for row in rows] == list(METHODS)
    options = {option["name"]: option for option in next(row for row in rows if row["name"] == "coreq")["options"]}
    assert options["beam"] == {"name": "beam", "type": "int", "default": 1}
    assert options["coefficient"]["type"].startswith("'corr' | ")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (61_234_567, "61.2 MB"), (3.5e12, "3.5 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_numbers() -> None:
    assert [number(None), number(0.123456), number(12345.6, 3)] == ["-", "0.1235", "1.23e+04"]

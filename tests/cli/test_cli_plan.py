"""``ptq plan`` and ``ptq quantize --plan`` on the terminal: what is printed, written and refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from cli.shared.plan_curve import curve_lines, picture_lines
from ptq.allocation import PlanOptions, make_planner
from ptq.allocation.problem.budget import Budget
from ptq.errors import UsageError, unknown_name
from tests.support.tiny_models import tiny_model

CURVE = [{"bits_per_weight": float(b), "file_bytes": 12.6e6 + b * 1e4, "predicted_kl": 4.0**-b} for b in (2, 4, 8)]
UNIFORM = [{"label": "4", "bits_per_weight": 4.0, "file_bytes": 12.64e6, "predicted_kl": 0.01}]
TEXT = ["--calib", "pydoc", "--calib-samples", "2", "--calib-seqlen", "32", "--device", "cpu"]


def test_sizes_of_a_small_model_are_told_apart_and_those_of_a_large_one_are_in_megabytes() -> None:
    lines = curve_lines(CURVE, UNIFORM)
    assert lines[0].split() == ["bits", "per", "weight", "file", "kB", "predicted", "KL"]
    assert [line.split()[1] for line in lines[1:]] == ["12,620.0", "12,640.0", "12,640.0", "12,680.0"]
    assert lines[3].endswith("all 4")
    large = [{**row, "file_bytes": row["file_bytes"] * 100} for row in CURVE]
    large[-1]["file_bytes"] *= 2
    assert "file MB" in curve_lines(large, [])[0]


def test_the_picture_has_the_curve_from_the_upper_left_to_the_lower_right() -> None:
    lines = picture_lines(CURVE, UNIFORM)
    rows = [line.partition("|")[2] for line in lines if "|" in line]
    assert rows[0].index("o") == 0
    assert rows[-1].index("o") == max(len(row) for row in rows) - 1
    assert sum(row.count("o") for row in rows) == 3
    assert sum(row.count("x") for row in rows) == 1
    assert picture_lines([{**CURVE[0], "predicted_kl": 0.0}], []) == []


def test_pareto_alone_draws_and_writes_the_curve(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    flags = ["plan", str(tiny_folder), "--pareto", "--candidates", "3,4", "--group-size", "32", *TEXT]
    assert main([*flags, "-o", "curve.txt"]) == 2
    assert "curve.txt: without a target there is no plan" in capsys.readouterr().err
    assert main([*flags, "-o", "curve.json"]) == 0
    shown = capsys.readouterr().out
    assert "o: allocated, x: one format for all linears" in shown
    assert "written to curve.json" in shown
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [row["label"] for row in found["uniform"]] == ["3", "4"]
    assert len(found["curve"]) == 25
    assert main([*flags, "-o", "curve.html"]) == 0
    assert "<svg" in (tmp_path / "curve.html").read_text()
    assert not (tmp_path / "plan.yaml").exists()


def test_where_a_plan_decides_no_other_format_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "formats:\n  a: {bits: 4, group_size: 32}\n  b: {bits: 8, group_size: 32}\n"
        "linears:\n  '*.mlp.*': a\n  '*.self_attn.*': b\n"
    )
    out = str(tmp_path / "OUT")
    assert main(["quantize", str(tiny_folder), "--method", "rtn", "--plan", str(file), "-o", out]) == 0
    printed = capsys.readouterr()
    assert f"rtn, formats of {file}:" in printed.err
    assert "rtn, 8 x int8 sym g32, 6 x int4 sym g32" in printed.out
    assert "int3" not in printed.out + printed.err


def test_budgets_and_files_are_checked_before_anything_is_scored(
    tiny_folder: Path, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PlanOptions(candidates="3,4", score="zd")
    planner = make_planner(tiny_folder, options, tokenizer=tiny_tokenizer, device="cpu", cache=None)
    object.__setattr__(planner, "score", lambda: pytest.fail("scored"))
    with pytest.raises(UsageError, match="below the smallest"):
        planner.planned(Budget(bpw=1.0))
    with pytest.raises(UsageError, match="above the largest"):
        planner.planned(Budget(size=10**12))
    with pytest.raises(UsageError, match="unknown solver"):
        planner.planned(Budget(fraction=0.5), "milk")
    missing = tmp_path / "missing" / "plan.yaml"
    assert main(["plan", str(tiny_folder), "--target-bpw", "4", "-o", str(missing)]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_plan_of_a_model_of_other_sizes_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zd = ["--score", "zd", "--candidates", "3,4", "--group-size", "32", "--fraction", "0.5", "--device", "cpu"]
    assert main(["plan", str(tiny_folder), *zd]) == 0
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    capsys.readouterr()
    assert main(["quantize", "deeper", "--method", "rtn", "--plan", "plan.yaml", "-o", "OUT"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "plan.yaml: this plan is for another model" in said
    assert main(["quantize", str(tiny_folder), "--method", "rtn", "--plan", "plan.yaml", "-o", "OUT"]) == 0


def test_a_long_list_of_names_is_cut() -> None:
    said = str(unknown_name("linear", "x", [f"model.layers.{i}.q_proj" for i in range(210)]))
    assert said.endswith("and 170 more.")
    assert str(unknown_name("linear", "x", ["a", "b"])).endswith("Known: a, b.")

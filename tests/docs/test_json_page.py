"""docs/json.md names every field that the code writes, so that the page cannot fall behind."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from evals.comparison.types import Candidate, Comparison, Difference, Flips, Score
from evals.record import Divergence, ModelInfo, Record, TaskResult, TextResult
from ptq.recipe import Recipe
from ptq.report import KeptTensor, LayerRecord, Report

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(\w+)`", PAGE))
EVALUATIONS = [Record, ModelInfo, TextResult, TaskResult, Divergence]
COMPARISONS = [Comparison, Candidate, Score, Difference, Flips]
FREE = {"recipe", "calibration", "results", "settings"}
"""What is described elsewhere, or by name alone."""


def section(title: str) -> set[str]:
    """Names in code marks under a heading of the page."""
    body = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(\w+)`", body))


def keys(value: Any) -> set[str]:
    """Names of the fields of a dataclass, or of a mapping."""
    return set(value) if isinstance(value, dict) else {field.name for field in dataclasses.fields(value)}


def all_keys(value: Any) -> Iterator[str]:
    """Names of fields at every depth, but for what is described elsewhere."""
    if isinstance(value, dict):
        yield from value
        for name, part in value.items():
            if name not in FREE:
                yield from all_keys(part)
    elif isinstance(value, list):
        for part in value:
            yield from all_keys(part)


@pytest.mark.parametrize("kind", [Report, LayerRecord, KeptTensor, Recipe().to_dict()], ids=str)
def test_every_field_of_the_report_is_documented(kind: Any) -> None:
    assert keys(kind) <= NAMED


@pytest.mark.parametrize("kind", EVALUATIONS, ids=lambda kind: str(kind.__name__))
def test_every_field_of_an_evaluation_is_documented(kind: Any) -> None:
    assert keys(kind) <= section("The record of ptq eval")


@pytest.mark.parametrize("kind", COMPARISONS, ids=lambda kind: str(kind.__name__))
def test_every_field_of_a_comparison_is_documented(kind: Any) -> None:
    assert keys(kind) <= section("ptq compare")


def test_nothing_is_documented_that_is_not_there() -> None:
    """First cells of the tables of evaluations and comparisons, but for columns of items, are fields."""
    written = {name for kind in (*EVALUATIONS, *COMPARISONS) for name in keys(kind)}
    written |= {"record", "compare", "rows", "metrics"}
    written |= {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mean_nll", "standard_error"}
    for title in ("The record of ptq eval", "ptq compare"):
        body = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
        for line in body.splitlines():
            if line.startswith("| `"):
                names = set(re.findall(r"`(\w+)`", line.split("|")[1]))
                assert names <= written, line


@pytest.fixture
def record(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A real record with a base, by every convention, of every kind of task."""
    rows = {
        "mmlu": {"query": "q", "choices": ["a", "b"], "gold": 1, "subject": "s"},
        "lambada_openai": {"context": "c", "continuation": "d"},
        "copa": {"query": "q", "choices": ["a", "b"], "gold": 1},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (tmp_path / "text.txt").write_text("Once upon a time there was a model. " * 20)
    arguments = ["--text", str(tmp_path / "text.txt"), "--seqlen", "16", "--stride", "8", "--limit", "2"]
    arguments += ["--convention", "segments,llamacpp,sliding,documents", "--cache", str(tmp_path / "cache")]
    arguments += ["--tasks", ",".join(rows), "--fewshot", "1", "--data", str(tmp_path), "-o", str(tmp_path / "r.json")]
    assert main(["eval", str(tiny_folder), "--against", str(tiny_folder), *arguments]) == 0
    capsys.readouterr()
    return tmp_path / "r.json"


def test_real_records_comparisons_and_reports(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(record.read_text())
    assert set(all_keys(content)) <= section("The record of ptq eval")
    for result in (*content["texts"], *content["tasks"]):
        assert keys(result["settings"]) <= section("The record of ptq eval")
    assert main(["compare", str(record), "--json"]) == 0
    assert set(all_keys(json.loads(capsys.readouterr().out))) <= section("ptq compare")
    assert main(["report", str(record), "-o", str(record.parent / "page.html"), "--json"]) == 0
    assert keys(json.loads(capsys.readouterr().out)) == section("ptq report")


def test_types_of_columns_are_all_named() -> None:
    from evals.items import _TYPES

    assert all(f"`{kind}`" in PAGE for kind in _TYPES)


def test_every_field_of_a_real_report_is_documented(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calib", "pydoc", "--calib-samples", "2", "--calib-seqlen", "32", "--json"]
    assert main(["quantize", str(tiny_folder), "-o", str(tmp_path / "OUT"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert keys(report) <= NAMED
    for part in ("model", "recipe", "calibration", "totals", "timing", "environment"):
        assert keys(report[part]) <= NAMED, part

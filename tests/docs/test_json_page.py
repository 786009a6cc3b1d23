"""docs/json.md names every field that the code writes, so that the page cannot fall behind."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from ptq.quantized import LayerRecord
from ptq.recipe import Recipe
from ptq.report import KeptTensor, Report

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(\w+)`", PAGE))


def keys(value: Any) -> set[str]:
    """Names of the fields of a dataclass, or of a mapping."""
    return set(value) if isinstance(value, dict) else {field.name for field in dataclasses.fields(value)}


@pytest.mark.parametrize("kind", [Report, LayerRecord, KeptTensor, Recipe().to_dict()], ids=str)
def test_every_field_of_the_report_is_documented(kind: Any) -> None:
    assert keys(kind) <= NAMED


def test_every_field_of_a_real_record_is_documented(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", "pydoc:eval", "--seqlen", "16", "--max-tokens", "64", "--json"]
    assert main(["eval", str(tiny_folder), "--against", str(tiny_folder), *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert keys(record) <= NAMED
    for part in ("text", "protocol", "perplexity", "base_perplexity", "divergence", "environment"):
        assert keys(record[part]) <= NAMED, part


def test_every_field_of_a_real_report_is_documented(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calib", "pydoc", "--calib-samples", "2", "--calib-seqlen", "32", "--json"]
    assert main(["quantize", str(tiny_folder), "-o", str(tmp_path / "OUT"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert keys(report) <= NAMED
    for part in ("model", "recipe", "calibration", "totals", "timing", "environment"):
        assert keys(report[part]) <= NAMED, part

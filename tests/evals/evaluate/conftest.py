"""A folder of data, and no cache outside the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evals.evaluate.rows import ROWS


@pytest.fixture
def data(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "wikitext2.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ_CACHE", str(tmp_path / "default cache"))

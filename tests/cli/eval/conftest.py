"""Texts and rows for `ptq eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.eval.commands import ROWS, TEXT


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path, text_file: str) -> Path:
    """A folder with rows of arc_easy and LAMBADA and with the text."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "lambada_openai.jsonl").write_text(json.dumps({"context": "Once upon a", "continuation": "time"}))
    (folder / "wikitext2.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ_CACHE", str(tmp_path / "default cache"))
    monkeypatch.delenv("PTQ_DATA", raising=False)

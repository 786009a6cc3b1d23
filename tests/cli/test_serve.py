"""``ptq serve``: what it refuses, and that it hands transformers' server the model with our loading in place."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from cli.main import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server is started with, in place of one that listens."""
    found: list[dict[str, Any]] = []
    stand_in = types.ModuleType("transformers.cli.serve")
    stand_in.Serve = lambda **options: found.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", stand_in)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    return found


def test_the_model_is_given_to_the_server(started: list[dict[str, Any]], tiny_folder: Path) -> None:
    assert main(["serve", str(tiny_folder), "--port", "8001", "--device", "cpu", "--dtype", "float32"]) == 0
    (options,) = started
    assert options == {
        "force_model": str(tiny_folder),
        "host": "localhost",
        "port": 8001,
        "device": "cpu",
        "dtype": "float32",
        "trust_remote_code": False,
    }
    assert "ptq" in AUTO_QUANTIZER_MAPPING


def test_missing_packages_are_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(tiny_folder)]) == 2
    assert 'pip install "ptq-toolkit[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.gguf"], "llama-server"),
        (["{folder}"], "has no config.json"),
        (["{folder}", "--dtype", "int8"], "--dtype must be one of"),
        (["{folder}", "--port", "0"], "--port"),
    ],
)
def test_refusals(
    words: list[str],
    reason: str,
    tmp_path: Path,
    started: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", *(word.format(folder=tmp_path) for word in words)]) != 0
    assert reason in capsys.readouterr().err
    assert not started

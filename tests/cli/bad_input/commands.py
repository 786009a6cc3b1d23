"""Calls of `ptq quantize` that the tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

Damage = Callable[[Path], None]


def quantize(model: Path | str, out: Path, *flags: str, text: Path | None = None) -> int:
    calibration = (
        ["--calib", str(text), "--calib-samples", "4", "--calib-seqlen", "16"] if text else ["--method", "rtn"]
    )
    return main(["quantize", str(model), "-o", str(out), "--device", "cpu", "--group-size", "16", *calibration, *flags])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is the error; stdout must be empty."""
    shown = capsys.readouterr()
    assert shown.out == ""
    line = shown.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in shown.err
    return line


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without what an unfinished run keeps in hidden ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def edit_json(file: str = "config.json", **fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))

    return damage

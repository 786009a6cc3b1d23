"""What the command line says and passes on about interrupted runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from ptq.report import Report


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, small_report: Report) -> list[dict[str, Any]]:
    """What `ptq.quantize` is called with; an entry ``stop`` in the list's first place makes it stop like Ctrl-C."""
    seen: list[dict[str, Any]] = []

    def quantize(model: str, recipe: object, **rest: Any) -> Report:
        seen.append(rest)
        if seen[0].get("stop"):
            raise KeyboardInterrupt
        return small_report

    monkeypatch.setattr("ptq.quantize", quantize)
    return seen


def test_restart_is_passed_on(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    for flags in ([], ["--restart"]):
        assert main(["quantize", "MODEL", "-o", str(tmp_path / "OUT"), *flags]) == 0
    assert [call.get("restart", False) for call in calls] == [False, True]


def test_ctrl_c_says_how_to_go_on(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    calls.append({"stop": True})
    assert main(["quantize", "MODEL", "-o", "OUT"]) == 130
    assert "the same command goes on from there (--restart starts over)" in capsys.readouterr().err
    assert main(["quantize", "MODEL", "-o", "OUT", "--json"]) == 130
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "Interrupted"
    assert "the same command goes on" in error["message"]


def test_ctrl_c_elsewhere_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(folder: str) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "load", stop)
    assert main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted."

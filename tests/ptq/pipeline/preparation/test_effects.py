"""An argument that decides nothing is named, on the command line and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ptq
from cli.main import main
from ptq.api import make_recipe
from ptq.pipeline.events import Event
from ptq.pipeline.preparation.effects import without_effect


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        ({"method": "rtn", "bits": 3}, set()),
        ({"method": "rtn", "calib": "pydoc", "calib_bos": "never"}, {"calib", "calib_bos"}),
        ({"method": "rtn", "seed": 1}, {"seed"}),
        ({"method": "rtn", "seed": 1, "rotate": ("down",)}, set()),
        ({"method": "gptq", "seed": 1, "calib": "pydoc", "compute_dtype": "float32"}, set()),
        ({"method": "gptq", "kv_symmetric": False, "act_symmetric": False}, {"kv_symmetric", "act_symmetric"}),
        ({"method": "gptq", "kv_symmetric": True, "kv_bits": 8}, set()),
        ({"method": "gptq", "rotate": (), "format": "itq3s"}, {"rotate"}),
        ({"method": "gptq", "rotate": ()}, set()),
        ({"method": "omniquant", "iters": 5, "epochs": 1, "lr_lora": 1e-3}, {"iters", "lr_lora"}),
        ({"method": "autoround", "iters": 5, "lr_offset": 1e-3}, set()),
    ],
)  # fmt: skip
def test_what_decides_nothing(fields: dict[str, Any], idle: set[str]) -> None:
    assert set(without_effect(fields, make_recipe(fields))) == idle


def test_python_names_them(tiny_folder: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    ptq.quantize(tiny_folder, out=tmp_path / "OUT", method="rtn", calib="c4", on_event=events.append)
    assert "calib has no effect: rtn reads no calibration text" in [event.text for event in events]


def test_the_command_line_names_flags(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr("ptq.quantize", stop)
    monkeypatch.setattr("ptq.forecast", stop)
    with pytest.raises(Stop):
        main(["quantize", str(tiny_folder), "--method", "rtn", "--calib-seqlen", "8", "--kv-asym", "--offload", "disk"])
    shown = capsys.readouterr().err
    assert "--calib-seqlen has no effect: rtn reads no calibration text" in shown
    assert "--offload has no effect" in shown
    assert "--kv-sym/--kv-asym has no effect: keys and values are not rounded" in shown
    with pytest.raises(Stop):
        main(["quantize", str(tiny_folder), "--method", "omniquant", "-O", "lr-lora=1", "--dry-run", "--restart"])
    shown = capsys.readouterr().err
    assert "-O lr_lora has no effect: lora_rank is 0" in shown
    assert "--restart has no effect: --dry-run writes nothing" in shown
    with pytest.raises(Stop):
        main(["quantize", str(tiny_folder), "--method", "gptq", "--calib-seqlen", "8", "--seed", "1"])
    assert "no effect" not in capsys.readouterr().err


def test_options_of_the_other_commands(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one and two and three. " * 20)
    model = str(tiny_folder)
    assert main(["eval", model, "--text", str(text), "--seqlen", "16", "--fewshot", "2", "--base-top-k", "9"]) == 0
    shown = capsys.readouterr().err
    assert "--fewshot has no effect: no task is scored" in shown
    assert "--base-top-k has no effect: it is about the base, and there is no --against" in shown
    assert "--seqlen" not in shown
    assert main(["generate", model, "x", "--max-new-tokens", "1", "--temperature", "0", "--seed", "3"]) == 0
    assert "--seed has no effect: at temperature 0 nothing is drawn" in capsys.readouterr().err

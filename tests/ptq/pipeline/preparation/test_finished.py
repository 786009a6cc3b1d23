"""A finished folder: the same call returns its report and does nothing; another one is refused without ``restart``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.errors import UsageError
from ptq.pipeline.events import Event
from ptq.report import REPORT_NAME, STAGING
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (4, 16), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(source: Path, out: Path, **options: Any) -> tuple[ptq.Report, list[Event]]:
    events: list[Event] = []
    defaults: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 16}
    return ptq.quantize(source, out=out, on_event=events.append, **defaults | options), events


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("options", [{}, {"method": "gptq", "calibration": CALIBRATION}, {"rotate": ("residual",)}])
def test_the_same_call_does_nothing(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    first, _ = run(source, out, **options)
    before = contents(out)
    second, events = run(source, out, **options)
    assert contents(out) == before
    assert second == first
    assert [event.kind for event in events].count("finished") == 1
    assert "block_done" not in {event.kind for event in events}
    assert "nothing is left to do. --restart makes it again." in events[-1].text
    _, events = run(source, out, restart=True, **options)
    assert "block_done" in {event.kind for event in events}


def test_another_place_of_the_same_model_and_another_device_setting_are_the_same(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")
    source.rename(tmp_path / "elsewhere")
    _, events = run(tmp_path / "elsewhere", tmp_path / "OUT", device="cpu", offload="disk")
    assert events[-1].kind == "finished"


def test_another_recipe_model_or_text_is_refused_and_restart_replaces(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    gptq = {"method": "gptq", "calibration": CALIBRATION}
    run(source, out, **gptq)
    before = contents(out)
    found = r"OUT holds a finished result \(gptq, 3 bits of .*model, 20\d\d-.*\) of another run: "
    with pytest.raises(UsageError, match=found + r"recipe\.scheme\.bits was 3 and is now 2\. Name another folder"):
        run(source, out, **gptq | {"bits": 2})
    with pytest.raises(UsageError, match=r"and [2-9] more.*--restart \(restart=True\)"):
        run(source, out, bits=2, ignore=("*.q_proj",), format="native", group_size=32, symmetric=False)
    other = Calibration(TOKENS.flip(0), "test", 3, "none")
    with pytest.raises(UsageError, match=found + "calibration was "):
        run(source, out, **gptq | {"calibration": other})
    tiny_model("llama", seed=1).save_pretrained(source)
    with pytest.raises(UsageError, match=found + r"model\.fingerprint was "):
        run(source, out, **gptq)
    assert contents(out) == before
    report, _ = run(source, out, bits=2, restart=True)
    assert report.recipe["scheme"]["bits"] == 2


def test_a_changed_text_file_is_another_run(tiny_folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "OUT"
    text.write_text("one and two and three. " * 60)
    gptq = {"method": "gptq", "calib": f"{text}@0:0.9", "calib_samples": 2, "calib_seqlen": 16}
    run(tiny_folder, out, **gptq)
    _, events = run(tiny_folder, out, **gptq)
    assert events[-1].kind == "finished"
    text.write_text("four and five and six. " * 60)
    with pytest.raises(UsageError, match="calibration was"):
        run(tiny_folder, out, **gptq)


def test_a_result_that_is_not_whole_is_made_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")
    shard = next((tmp_path / "OUT").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    _, events = run(source, tmp_path / "OUT")
    assert any("is not whole" in event.text and shard.name in event.text for event in events)
    assert shard.read_bytes() == whole


def test_a_report_that_cannot_be_read_is_not_replaced(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")
    (tmp_path / "OUT" / REPORT_NAME).write_text("{")
    with pytest.raises(UsageError, match="whose report cannot be read"):
        run(source, tmp_path / "OUT")
    run(source, tmp_path / "OUT", restart=True)


def test_an_interrupted_run_over_a_finished_result_goes_on(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")

    def stop(event: Event) -> None:
        if event.kind == "block_done":
            raise KeyboardInterrupt

    again = {"method": "rtn", "bits": 2, "group_size": 16}
    with pytest.raises(KeyboardInterrupt):
        ptq.quantize(source, out=tmp_path / "OUT", on_event=stop, restart=True, **again)
    assert (tmp_path / "OUT" / STAGING).is_dir()
    report, events = run(source, tmp_path / "OUT", bits=2)
    assert any(event.text.startswith("going on after 1 of") for event in events)
    assert report.recipe["scheme"]["bits"] == 2


def test_a_forecast_says_that_a_result_is_there(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")
    found = ptq.forecast(source, out=tmp_path / "OUT", method="rtn", bits=2, group_size=16)
    assert any("holds a finished result" in warning for warning in found.warnings)
    same = ptq.forecast(source, out=tmp_path / "OUT", method="rtn", bits=3, group_size=16)
    assert any("nothing is left to do" in warning for warning in same.warnings)


def test_the_command_line_says_so_in_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(source), "--method", "rtn", "--bits", "3", "-o", str(tmp_path / "OUT")]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[1:] == [line for line in shown.err.splitlines() if "nothing is left to do" in line]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["method"] == "rtn"
    assert main([*command, "--bits", "4"]) == 2
    assert "recipe.scheme.bits was 3 and is now 4" in capsys.readouterr().err
    assert main([*command, "--bits", "4", "--restart"]) == 0


def test_what_had_no_effect_makes_no_other_run(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "OUT")
    _, events = run(source, tmp_path / "OUT", seed=5, calib="pydoc")  # nearest rounding reads no data
    assert events[-1].kind == "finished"
    run(source, tmp_path / "ROTATED", rotate=("down",))
    with pytest.raises(UsageError, match=r"calibration\.seed was 0 and is now 5"):
        run(source, tmp_path / "ROTATED", rotate=("down",), seed=5)  # the seed of the rotation


def test_a_path_that_no_report_can_name_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caf\\udce9' is not valid UTF-8"):
        run(source, tmp_path / "caf\udce9")
    assert not list(tmp_path.glob("caf*"))

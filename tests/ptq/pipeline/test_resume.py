"""A run that is cut off anywhere goes on to the same bytes; changed conditions are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from ptq.errors import OutputError
from ptq.pipeline.events import Event
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (9, 24), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")


class Cut(Exception):
    """The accident."""


def contents(folder: Path) -> dict[str, bytes]:
    """All files that must be the same; the report has seconds in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "ptq_report.json"}


def run(source: Path, out: Path, cut_at: tuple[str, int] | None = None, **options: Any) -> list[Event]:
    """Quantize; raise `Cut` at the given event (kind, number of its kind)."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if cut_at is not None and event.kind == cut_at[0] and sum(e.kind == event.kind for e in events) == cut_at[1]:
            raise Cut

    defaults: dict[str, Any] = {"bits": 3, "group_size": 16, "calibration": CALIBRATION}
    ptq.quantize(source, out=out, on_event=listen, **defaults | options)
    return events


@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "qwen3_moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "coreq"])
def test_cut_anywhere_gives_the_same_bytes(method: str, family: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model(family, num_hidden_layers=4).save_pretrained(source)
    run(source, tmp_path / "whole", method=method)
    for kind, number in (("layer", 2), ("block_done", 1), ("layer_done", 9), ("block_done", 1), ("block_done", 1)):
        with pytest.raises(Cut):
            run(source, tmp_path / "out", (kind, number), method=method)
    events = run(source, tmp_path / "out", method=method)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sum(event.kind == "block_done" for event in events) <= 1  # the others were finished, bit by bit
    whole, resumed = (ptq.Report.load(tmp_path / name) for name in ("whole", "out"))
    assert [layer.name for layer in resumed.layers] == [layer.name for layer in whole.layers]
    assert [layer.loss for layer in resumed.layers] == [layer.loss for layer in whole.layers]
    assert resumed.kept == whole.kept
    assert resumed.files == whole.files
    assert resumed.warnings == whole.warnings
    assert resumed.environment["flops"].get("solve") == whole.environment["flops"].get("solve")
    assert set(resumed.timing) == set(whole.timing)
    assert resumed.timing["write"] > 0


def test_what_changes_nothing_may_change(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "model", tmp_path / "out", ("block_done", 2))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "model", tmp_path / "elsewhere" / "model")  # its name is in the card
    run(tmp_path / "elsewhere" / "model", tmp_path / "out", offload="disk")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_conditions_are_refused_with_both_values_and_restart_helps(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("llama").save_pretrained(source)
    with pytest.raises(Cut):
        run(source, tmp_path / "out", ("block_done", 1))
    with pytest.raises(OutputError, match=r"recipe\.scheme\.bits was 3 and is now 4.*--restart"):
        run(source, tmp_path / "out", bits=4)
    other = Calibration(TOKENS.flip(0), "test", 3, "none")
    with pytest.raises(OutputError, match=r"calibration was .* and is now"):
        run(source, tmp_path / "out", calibration=other)
    tiny_model("llama", seed=1).save_pretrained(source)
    with pytest.raises(OutputError, match=r"model\.fingerprint"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / ".ptq_partial" / "journal.jsonl").exists()  # nothing is lost by asking
    run(source, tmp_path / "out", bits=4, restart=True)
    run(source, tmp_path / "whole", bits=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("offload", ["disk", "memory"])
def test_offloaded_activations_change_no_byte_and_leave_nothing(offload: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("llama").save_pretrained(source)
    run(source, tmp_path / "whole")
    run(source, tmp_path / "out", offload=offload)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_repeated_passes_give_the_bytes_of_lockstep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "whole")
    monkeypatch.setattr("calib.runner.runner._LOCKSTEP_SHARE", 0.0)
    run(tmp_path / "model", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

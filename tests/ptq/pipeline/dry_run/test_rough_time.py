"""A run that takes hours without a GPU says so before it starts, and names what is cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
import ptq.pipeline.dry_run.rough_time
from calib.data.tokens import Calibration
from ptq.pipeline.dry_run.rough_time import long_run_notices, rough_operations
from ptq.pipeline.events import Event
from ptq.pipeline.preparation.method_setup import set_up_method
from ptq.pipeline.preparation.schemes.scheme_assignment import make_plan
from ptq.recipe import Recipe
from tests.support.tiny_models import tiny_model


def parts(method: str, **options: Any) -> tuple[Any, ...]:
    model, recipe = tiny_model("llama"), Recipe(method, options=options)
    return model, make_plan(model, recipe, torch.float32), set_up_method(recipe)


def test_operations_of_passes_statistics_and_solves() -> None:
    model, plan, method = parts("gptq")
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in plan.schemes]
    tokens = 8 * 16
    passes = 4 * tokens * sum(out * width for out, width in shapes)
    statistics = 4 / 7 * 2 * tokens * sum(width**2 for _, width in shapes)
    solves = sum(2 * out * width**2 + width**3 for out, width in shapes)
    assert rough_operations(model, plan, method, 8, 16) == pytest.approx(passes + statistics + solves)
    assert rough_operations(*parts("rtn"), 8, 16) == 0


def test_learning_counts_its_steps() -> None:
    few = rough_operations(*parts("autoround", iters=10, max_passes=0), 8, 16)
    many = rough_operations(*parts("autoround", iters=1000, max_passes=0), 8, 16)
    assert many > 50 * few > 50 * rough_operations(*parts("coreq"), 8, 16) / 10


def test_only_what_takes_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = rough_operations(*parts("coreq"), 128, 2048)
    monkeypatch.setattr(
        ptq.pipeline.dry_run.rough_time, "_operations_per_second", lambda: operations / 0.5 / (7 * 3600)
    )
    (notice,) = long_run_notices(*parts("coreq"), 128, 2048)
    assert notice.startswith("without a GPU this takes about 7 h (128 x 2048 calibration tokens")
    assert "--calib-samples 16 --calib-seqlen 512 takes about 13 min" in notice
    assert "--method rtn needs no calibration" in notice
    assert long_run_notices(*parts("coreq"), 16, 512) == []
    assert long_run_notices(*parts("rtn"), 128, 2048) == []
    monkeypatch.setattr(ptq.pipeline.dry_run.rough_time, "_operations_per_second", lambda: operations / 0.5 / 600)
    assert long_run_notices(*parts("coreq"), 128, 2048) == []
    (notice,) = long_run_notices(*parts("omniquant"), 128, 2048)
    assert "--method coreq learns nothing" in notice


def test_it_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ptq.pipeline.dry_run.rough_time, "_operations_per_second", lambda: 1.0)
    tokens = torch.randint(2, 400, (4, 16), generator=torch.Generator().manual_seed(3))
    events: list[Event] = []
    ptq.quantize(
        tmp_path / "model",
        method="gptq",
        device="cpu",
        calibration=Calibration(tokens, "test", 3, "none"),
        out=tmp_path / "OUT",
        on_event=events.append,
    )
    said = [event.kind for event in events if event.kind == "blocks" or "without a GPU" in event.text]
    assert said == ["message", "blocks"]

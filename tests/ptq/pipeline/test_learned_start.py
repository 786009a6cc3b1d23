"""What learning starts from and what it may not do: end worse than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq
import ptq.learning.stepper
from calib.data.tokens import Calibration
from ptq.learning import LearnedConfig
from ptq.learning.losses import output_loss
from ptq.learning.split import split_sequences
from ptq.pipeline.events import Event
from ptq.runtime.linear import QuantLinear
from tests.ptq.pipeline.test_windowed import CALIBRATION, TOKENS, run
from tests.support.tiny_models import tiny_model


def _codes(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, m.quantized().dequantize()) for n, m in model.named_modules() if isinstance(m, QuantLinear)]


@pytest.mark.parametrize(
    ("method", "hurt"),
    [(m, "not finite") for m in ("sliderquant", "omniquant", "autoround")] + [("sliderquant", "wrong way")],
)
def test_learning_that_would_hurt_leaves_the_start_as_it_is(
    method: str, hurt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what the method of the start gives alone: with batches of one sequence both read the data alike."""
    factor = float("nan") if hurt == "not finite" else -1.0
    monkeypatch.setattr(ptq.learning.stepper, "output_loss", lambda *args: output_loss(*args) * factor)
    model, events = tiny_model("llama"), list[Event]()
    options = {"bits": 2, "group_size": 64, "calibration": CALIBRATION}
    ptq.quantize(model, out=tmp_path / "start", method="coreq", **options)
    report = run(model, tmp_path / "out", method=method, init="coreq", batch=1, events=events, **options)
    for row in report.windows:
        assert not row["accepted"]
        assert row["loss_after"] == row["loss_before"]
        assert row["held_out"] == 2
        assert len(row["notes"]) == 2, "tried twice"
        assert ("was not finite" if hurt == "not finite" else "was not lowered") in row["notes"][0]
    assert any(event.kind == "message" and "put back" in event.text for event in events)
    for (name, ours), (_, wanted) in zip(
        _codes(ptq.load(tmp_path / "out")), _codes(ptq.load(tmp_path / "start")), strict=True
    ):
        assert torch.equal(ours, wanted), name


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("coreq", {}),
        ("coreq", {"rotate": ("residual",)}),
        ("rtn", {}),
        ("rtn", {"method": "omniquant", "lr_clip": 0.1}),
    ],
    ids=str,
)
def test_little_data_never_end_worse_than_the_start(start: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Eight sequences, 2 bits: neither by the loss on the sequences held out nor by the divergence of their tokens."""
    model, events = tiny_model("llama"), list[Event]()
    tokens = torch.randint(2, 400, (8, 48), generator=torch.Generator().manual_seed(3))
    fixed: dict[str, Any] = {"bits": 2, "group_size": 64, "calibration": Calibration(tokens, "test", 3, "none")}
    rotate = {"rotate": options["rotate"]} if "rotate" in options else {}
    ptq.quantize(model, out=tmp_path / "start", method=start, **fixed, **rotate)
    settings = {"method": "sliderquant", "init": start, "iters": 40, "batch": 1, **fixed, **options}
    report = run(model, tmp_path / "out", events=events, **settings)
    assert any("learning on 6 of 8 calibration sequences, 1 a step" in event.text for event in events)
    assert all(row["loss_after"] <= row["loss_before"] for row in report.windows)
    assert any(row["accepted"] for row in report.windows) or start == "coreq"
    packed = [ptq.load(tmp_path / name) for name in ("out", "start")]
    assert _divergence(model, packed[0], tokens[6:]) <= _divergence(model, packed[1], tokens[6:])


def _divergence(model: Any, packed: Any, tokens: Tensor) -> float:
    """Mean KL of next tokens."""
    with torch.no_grad():
        full, own = (one(input_ids=tokens).logits.log_softmax(-1) for one in (model, packed))
    return float((full.exp() * (full - own)).sum(-1).mean())


def test_a_start_is_the_better_one_where_the_choice_is_ours(tmp_path: Path) -> None:
    """Statistics of one token say nothing of the others: nearest rounding is taken there, and said."""
    model, events = tiny_model("llama"), list[Event]()
    calibration = Calibration(TOKENS.clone(), "test", 3, "none")
    calibration.tokens[:6] = 7
    settings = {"calibration": calibration, "init_data": "training", "bits": 2, "init": "auto"}
    report = run(model, tmp_path / "out", method="sliderquant", events=events, **settings)
    methods = {name for row in report.windows for name in row["init"]}
    assert "rtn" in methods
    assert any("starts from rtn: its loss over the sequences held out" in event.text for event in events)


def test_with_fewer_sequences_than_four_nothing_is_held_out_and_that_is_said(tmp_path: Path) -> None:
    events = list[Event]()
    calibration = Calibration(TOKENS[:3], "test", 3, "none")
    report = run(tiny_model("llama"), tmp_path / "out", calibration=calibration, batch=2, events=events)
    assert any("3 calibration sequences are too few to hold some out" in event.text for event in events)
    assert {row["held_out"] for row in report.windows} == {0}


@pytest.mark.parametrize(
    ("sequences", "batch", "processes", "wanted"),
    [
        (128, 4, 1, (4, 16)), (128, 8, 1, (8, 16)), (32, 4, 1, (4, 4)), (32, 8, 1, (7, 4)), (16, 4, 1, (3, 4)),
        (8, 4, 1, (3, 2)), (8, 8, 1, (6, 2)), (4, 4, 1, (2, 2)), (3, 2, 1, (2, 0)), (16, 8, 2, (7, 2)),
        (8, 1, 7, (1, 0)),
    ],
)  # fmt: skip
def test_sequences_are_divided_into_equal_batches_and_two_or_more_held_out(
    sequences: int, batch: int, processes: int, wanted: tuple[int, int]
) -> None:
    split = split_sequences(LearnedConfig(batch=batch), sequences, processes)
    assert (split.batch, split.held_out) == wanted
    assert split.held_out == 0 or (sequences - split.held_out) % split.batch == 0


@pytest.mark.parametrize(
    ("changes", "batches", "wanted"),
    [({}, 28, 100), ({}, 2, 24), ({"max_passes": 0}, 2, 100), ({"epochs": 30}, 2, 60), ({"iters": 10}, 2, 10)],
)
def test_steps_are_cut_to_passes_over_little_data(changes: dict[str, Any], batches: int, wanted: int) -> None:
    config = LearnedConfig(**{"iters": 100, "intra": "off", **changes})
    assert config.steps(batches, [3]) == wanted

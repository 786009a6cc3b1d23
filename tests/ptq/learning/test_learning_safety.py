"""What keeps learning safe: losses that are not finite or not lowered, blocks with nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq.learning.stepper
import ptq.learning.training
from calib.checkpoint.reader import open_model
from calib.runner.runner import CalibrationRunner
from calib.runner.window_schedule import Window
from ptq.errors import NumericalError, UsageError
from ptq.learning import LearnedConfig
from ptq.learning.block import BlockLearner
from ptq.learning.losses import output_loss
from tests.ptq.learning.windows import SCHEME, TOKENS, options, states, tiny_window, train
from tests.support.tiny_models import tiny_model


def poisoned(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Losses of steps become NaN; those over all data stay as they are."""
    calls = iter(range(10**6))

    def loss(*args: Any) -> Tensor:
        return output_loss(*args) * (math.nan if when(next(calls)) else 1.0)

    monkeypatch.setattr(ptq.learning.stepper, "output_loss", loss)


@pytest.mark.parametrize("method", ["sliderquant-lora", "sliderquant", "autoround", "omniquant"])
def test_a_loss_that_is_not_finite_puts_everything_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, lambda number: number % 6 == 3)
    config = options(method)
    with tiny_window(config, 2) as (window, learners):
        start = states(learners)
        (record,) = train(window, learners, config)
        found = states(learners)
    assert all(torch.equal(found[name], value) for name, value in start.items())
    assert len(record.notes) == 2
    assert all("was not finite after 6 steps" in note and "put back" in note for note in record.notes)
    assert "with a quarter of the rates" in record.notes[1]
    assert record.loss_after == record.loss_before
    assert math.isfinite(record.loss_before)


def test_a_second_try_is_kept_if_it_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, lambda number: number == 2)
    config = options("omniquant")
    with tiny_window(config) as (window, learners):
        start = states(learners)
        (record,) = train(window, learners, config)
        moved = max(float((value - start[name]).abs().max()) for name, value in states(learners).items())
    assert len(record.notes) == 1
    assert record.loss_after < record.loss_before
    assert 0 < moved <= 6 * 0.25 * config.lr_clip * 1.01, "a quarter of the rates"


@pytest.mark.parametrize(
    ("method", "changes"), [("omniquant", {"lr_clip": 900.0}), ("sliderquant-lora", {"lr_lora": 99.0})]
)
def test_what_does_not_lower_the_loss_is_put_back(method: str, changes: dict[str, float]) -> None:
    config = options(method, grad_clip=0.0, **changes)
    with tiny_window(config) as (window, learners):
        start = states(learners)
        (record,) = train(window, learners, config)
        found = states(learners)
        (again,) = train(window, learners, config, 1)
    assert all(torch.equal(found[name], value) for name, value in start.items())
    assert record.notes
    assert all("put back" in note for note in record.notes)
    assert record.loss_after == record.loss_before
    assert again.loss_before == record.loss_after, "the loss that is told is that of what was kept"


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data[3, 4] = math.nan
    with torch.no_grad():
        runner = CalibrationRunner(open_model(model), TOKENS, device=torch.device("cpu"), dtype=torch.float32, batch=8)
        windows = runner.windows([Window(0, 1), Window(1, 2)])
        block = next(windows).blocks[0]
        with pytest.raises(NumericalError, match=rf"{name}: .* of the weights are NaN"):
            BlockLearner(block, dict.fromkeys(block.linears, SCHEME), LearnedConfig())


def test_activations_that_are_not_finite_end_it() -> None:
    config = LearnedConfig()
    with tiny_window(config) as (window, learners):
        window.runner.activations(full=False)[0] = window.runner.hidden(0, full=False) * math.inf
        with pytest.raises(NumericalError, match=r"the loss of model\.layers\.0 .* before anything is learned"):
            train(window, learners, config)


def test_nothing_to_learn_is_an_error_and_no_rounding_in_silence() -> None:
    config = LearnedConfig(lora_rank=0, clip="off")
    with (
        tiny_window(config) as (window, learners),
        pytest.raises(UsageError, match=r"layers\.0: nothing is left to learn"),
    ):
        train(window, learners, config)


def test_blocks_in_full_precision_are_passed_over() -> None:
    config = LearnedConfig()
    with tiny_window(config, scheme=None) as (window, learners):
        assert train(window, learners, config) == []
        learners[0].settle()
        assert learners[0].fold() == {}
        full, own = (window.run(0, full=kind) for kind in (True, False))
        assert torch.equal(full, own)


@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_a_state_with_a_larger_squared_error_does_not_count(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning lowers the loss over every token's energy; the squared error is made to fall or grow with it."""
    config = options("sliderquant", loss="token")
    with tiny_window(config) as (window, learners):
        start, looks = states(learners), iter(range(10**6))

        def loss(output: Tensor, target: Tensor, kind: str, corner: float = 1.0) -> Tensor:
            if kind != "mse":
                return output_loss(output, target, kind, corner)
            return torch.tensor(1.0 if next(looks) < len(window.runner.fitted_batches) else factor)

        monkeypatch.setattr(ptq.learning.training, "output_loss", loss)
        (record,) = train(window, learners, config)
        found = states(learners)
    grew = factor > 1
    assert record.accepted is not grew
    assert all(torch.equal(found[name], value) for name, value in start.items()) is grew
    assert len(record.notes) == 2 * grew
    assert all("was lowered only at a larger squared error" in note for note in record.notes)

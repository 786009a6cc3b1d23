"""Losses, optimizers, options and records of learned methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.learning import LearnedConfig
from ptq.learning.losses import output_loss
from ptq.learning.optimizer import Optimizer, decayed
from ptq.learning.training import WindowRecord
from ptq.methods import METHODS
from ptq.scheme import Scheme
from tests.ptq.learning.windows import options


def test_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    error = (output - target).flatten().tolist()
    assert output_loss(output, target, "mse").item() == pytest.approx(sum(e * e for e in error) / 30, rel=1e-5)
    for corner in (1.0, 0.7, 1e9):
        bends = [e * e / 2 if abs(e) < corner else corner * (abs(e) - corner / 2) for e in error]
        assert output_loss(output, target, "huber", corner).item() == pytest.approx(sum(bends) / 30, rel=1e-5)
    shares = [
        sum((output[s, t] - target[s, t]).square().tolist()) / sum(target[s, t].square().tolist())
        for s in range(2)
        for t in range(3)
    ]
    assert output_loss(output, target, "token").item() == pytest.approx(sum(shares) / 6, rel=1e-5)
    halves = output_loss(output.bfloat16(), target.bfloat16(), "mse")
    assert halves.dtype == torch.float32


def test_an_optimizer_leaves_what_has_no_gradient_and_forgets() -> None:
    for kind in ("adamw", "sign"):
        tensors = {name: (torch.ones(3), 0.5) for name in "ab"} | {"c": (torch.ones(3), 0.25)}
        optimizer = Optimizer(tensors, LearnedConfig(optimizer=kind, grad_clip=0.0))  # type: ignore[arg-type]
        optimizer.set_decay(0.5)
        gradient = torch.tensor([3.0, -2.0, 0.0])
        optimizer.step([gradient, None, gradient])
        for name, step in (("a", 0.25), ("b", 0.0), ("c", 0.125)):
            wanted = torch.tensor([1 - step, 1 + step, 1.0])
            torch.testing.assert_close(tensors[name][0], wanted)
            assert tensors[name][0].grad is None
        assert torch.equal(gradient, torch.tensor([3.0, -2.0, 0.0]))


def test_gradients_are_clipped_together() -> None:
    moved = {name: (torch.zeros(1), 1.0) for name in "ab"}
    seen: list[Tensor] = []
    optimizer = Optimizer(moved, LearnedConfig(optimizer="sign", grad_clip=1.0))
    optimizer._sign_step = lambda: seen.extend(t.grad.clone() for t, _ in moved.values() if t.grad is not None)  # type: ignore[method-assign]
    optimizer.step([torch.tensor([3.0]), torch.tensor([4.0])])
    optimizer.step([torch.tensor([0.3]), torch.tensor([0.4])])
    torch.testing.assert_close(torch.cat(seen), torch.tensor([0.6, 0.8, 0.3, 0.4]))


def test_rates_fall_to_nothing_or_stay() -> None:
    linear, constant = LearnedConfig(), LearnedConfig(decay="constant")
    assert [decayed(linear, step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert {decayed(constant, step, 4) for step in range(4)} == {1}
    for steps in (50, 200, 1000):  # signed steps over a whole decay: half a level, and a little more
        total = sum(decayed(linear, step, steps) / steps for step in range(steps))
        assert total == pytest.approx(0.5 + 0.5 / steps)


def test_steps_of_a_stage() -> None:
    published = options("sliderquant-lora")
    assert published.steps(43, [4]) == 10 * 43
    assert published.steps(43, [4, 2]) == 30 * 43
    assert options("sliderquant-lora", intra="off").steps(43, [4]) == 20 * 43
    assert options("sliderquant-lora", epochs=7, stages=3).steps(43, [2]) == round(7 * 43 / 3)
    assert options("sliderquant-lora", grad_accum=4).steps(8, [4]) == 20
    assert options("omniquant").steps(128, [4]) == 20 * 128
    assert options("autoround", max_passes=0).steps(16, [4]) == options("autoround").steps(99, [2]) == 200
    assert options("autoround").steps(16, [4]) == 12 * 16  # passes over so few sequences are bounded
    assert options("autoround", epochs=2).steps(16, [4]) == 32
    assert options("autoround", iters=1, grad_accum=50).steps(16, [4]) == 1


def test_sweeps_and_stages() -> None:
    assert LearnedConfig().sweeps == ((0.5,), (1.0,))
    assert LearnedConfig(intra="window").sweeps == ((0.5, 1.0),)
    assert LearnedConfig(intra="off").sweeps == LearnedConfig(init="gptq").sweeps == ((1.0,),)
    assert LearnedConfig(intra="sweep", init="gptq").sweeps == ((0.5,), (1.0,))
    assert LearnedConfig(intra="window", stages=4).sweeps == ((0.25, 0.5, 0.75, 1.0),)


def test_rates_as_published() -> None:
    low, high = Scheme(2), Scheme(4)
    lora, omni, around = options("sliderquant-lora"), options("omniquant"), options("autoround")
    assert (lora.rates(high, 9).lora, lora.rates(low, 9).lora, lora.rates(high, 9).clip) == (3e-4, 1.5e-3, 3e-2)
    assert (omni.rates(low, 9).clip, omni.rates(low, 9).scale) == (1e-2, 5e-3)
    assert (around.rates(low, 200).offset, around.rates(high, 200).clip) == (1 / 200, 1 / 200)
    assert options("autoround", lr_offset=0.25).rates(low, 200).offset == 0.25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": -1}, r"epochs is a whole number from 0 .*got -1"),
        ({"lora_rank": -4}, r"lora_rank is a whole number from 0 .*got -4"),
        ({"lora_rank": 10**6}, r"lora_rank is a whole number .*4096"),
        ({"stages": 0}, r"stages is a whole number from 1"),
        ({"batch": 0}, r"batch is a whole number from 1"),
        ({"grad_accum": 0}, r"grad_accum is a whole number from 1"),
        ({"lr_clip": -1.0}, r"lr_clip is 0 .*, got -1"),
        ({"lr_clip": 1e4}, r"lr_clip is 0 .* below 1000, got 10000"),
        ({"lr_lora": math.nan}, r"lr_lora is 0 .*got nan"),
        ({"grad_clip": math.inf}, r"grad_clip is 0 .*got inf"),
        ({"loss": "mae"}, r"unknown loss 'mae'.*huber, mse, token"),
        ({"intra": "windows"}, r"unknown intra 'windows'.*Did you mean 'window'"),
        ({"schedule": "slide"}, r"unknown schedule 'slide'.*'slider'"),
        ({"init": "gptqq"}, r"unknown init 'gptqq'.*'gptq'"),
        ({"rounding": "up"}, r"unknown rounding 'up'"),
        ({"lora_rank": 0, "clip": "off", "scaling": "off"}, r"nothing is left to learn"),
        ({"epochs": 1.5}, r"epochs is a int, got 1\.5"),
        ({"windows": 2}, r"unknown option of sliderquant-lora 'windows'"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options("sliderquant-lora", **changes)


def test_every_learned_method_is_a_config() -> None:
    learned = [name for name, method in METHODS.items() if issubclass(method.config, LearnedConfig)]
    assert {"sliderquant", "sliderquant-lora", "omniquant", "autoround"} <= set(learned)
    for name in learned:
        assert options(name).windows(6)


def test_a_record_survives_json() -> None:
    record = WindowRecord(
        sweep=1,
        window=2,
        start=3,
        stop=5,
        share=0.5,
        init=("coreq", "rtn"),
        loss_before=0.25,
        loss_after=0.125,
        accepted=True,
        held_out=2,
        steps=7,
        planned=9,
        seconds=1.5,
        captured=False,
        notes=("said",),
    )
    assert WindowRecord.from_dict(record.to_dict()) == record
    assert record.to_dict()["notes"] == ["said"]

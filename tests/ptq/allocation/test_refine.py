"""Refinement, the curve of budgets and the page of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.allocation import Planner, PlanOptions, make_planner
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.budget import Budget, budget_limit
from ptq.allocation.problem.candidates import rounding_errors
from ptq.allocation.problem.solver import Problem, solve
from ptq.allocation.progress import Steps
from ptq.allocation.refine import Refiner, significantly_lower
from ptq.errors import UsageError
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (40, 24), generator=torch.Generator().manual_seed(1))
BASE = ptq.Scheme(group_size=16)


def planner(model: Any, **options: Any) -> Planner:
    settings = PlanOptions(**{"base": BASE, "candidates": "2,3,4,6", **options})
    tokens = Calibration(TOKENS, "test", 1, "none")
    return make_planner(model, settings, calibration=tokens, device="cpu", cache=None)


def whole_kl(model: Any, made: Planner, choice: Any) -> float:
    """KL per token of a choice of formats, by running the whole model twice."""
    tokens = made.setting.calibration.tokens if made.setting.calibration else TOKENS
    kept = {}
    with torch.no_grad():
        full = model(input_ids=tokens).logits
        for item, column in zip(made.items, choice, strict=True):
            for one in item.linears:
                weight = model.get_submodule(one.name).weight
                kept[one.name] = weight.data
                (error,) = rounding_errors(weight.data, (made.setting.candidates[int(column)],))
                weight.data = weight.data + error
        kl = token_kl(full, model(input_ids=tokens).logits).mean()
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
    return float(kl)


def test_marginals_are_those_of_the_whole_mixed_model() -> None:
    model = tiny_model("llama")
    made = planner(model)
    allocation = made.allocate(Budget(bpw=4.5))
    with made._stores() as new_store:
        refiner = Refiner(made.items, made.setting, made.setting.calibration.tokens, new_store, Steps())
        below, above = refiner._marginals(made.table, allocation)
    here = whole_kl(model, made, allocation.choice)
    for row in (0, 6, 13):
        for side, found in ((-1, below), (1, above)):
            column = int(allocation.choice[row]) + side
            if 0 <= column < 4:
                other = allocation.choice.copy()
                other[row] = column
                assert found[row] == pytest.approx(whole_kl(model, made, other) - here, abs=2e-5)
            else:
                assert np.isnan(found[row])


def test_refinement_is_kept_only_where_held_out_kl_falls() -> None:
    model = tiny_model("llama")
    made = planner(model)
    budget = Budget(bpw=3.6)
    limit = budget_limit(made.table, budget, 0)
    poor = solve(Problem(made.table.scores[::-1].copy(), made.table.bits, limit))  # scores of the wrong linears
    with made._stores() as new_store:
        refiner = Refiner(made.items, made.setting, made.setting.calibration.tokens, new_store, Steps())
        better, notes = refiner.refine(made.table, poor, limit, 2, made.measure)
        same, refused = refiner.refine(made.table, poor, limit, 1, lambda _: np.ones((2, 24)))
    assert better.cost <= limit * (1 + 1e-9)
    assert made.measure(better).mean() < made.measure(poor).mean()
    assert "items change their format" in notes[0]
    assert (same.choice == poor.choice).all()
    assert "is not taken" in refused[0]
    moved = np.abs(made.table.bits[np.arange(14), better.choice] - made.table.bits[np.arange(14), poor.choice]).sum()
    assert moved <= 2 * 0.12 * poor.cost


def test_a_plan_is_refined_and_says_so() -> None:
    options = PlanOptions(base=BASE, candidates="2,3,4,6")
    tokens = Calibration(TOKENS, "test", 1, "none")
    fields: dict[str, Any] = {"options": options, "calibration": tokens, "device": "cpu", "cache": None}
    plan = ptq.plan(tiny_model("llama"), target_bpw=3.6, refine=1, **fields)
    assert any(note.startswith("refinement 1") for note in plan.about["notes"])
    assert plan.about["bits_per_weight"] <= 3.6
    with pytest.raises(UsageError, match="score in nats"):
        ptq.plan(
            tiny_model("llama"), target_bpw=4.5, refine=1, **{**fields, "options": PlanOptions(base=BASE, score="zd")}
        )
    with pytest.raises(UsageError, match="--target-bpw or --target-size"):
        ptq.plan(tiny_model("llama"), max_kl=5.0, refine=1, **fields)


def test_a_difference_within_the_noise_is_no_fall() -> None:
    draw = np.random.default_rng(0)
    old = draw.uniform(0.1, 1.0, (8, 256))
    assert significantly_lower(old - 0.05, old)
    assert not significantly_lower(old, old)
    assert not significantly_lower(old + draw.normal(0, 0.3, old.shape), old)
    assert not significantly_lower(old + 0.05, old)


def test_the_curve_falls_and_is_nowhere_above_one_format_for_all() -> None:
    made = planner(tiny_model("llama"))
    curve, uniform = made.curve(9), made.uniform()
    values = [row["predicted_kl"] for row in curve]
    assert values == sorted(values, reverse=True)
    bits = [row["bits_per_weight"] for row in curve]
    for row in uniform:
        assert np.interp(row["bits_per_weight"], bits, values) <= row["predicted_kl"] * 1.3
        same = made.allocate(Budget(bpw=row["bits_per_weight"]))
        assert same.score <= row["predicted_kl"] * (1 + 1e-6)


def test_the_command_draws_the_curve_and_a_page(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on. " * 200)
    page = tmp_path / "plan.html"
    flags = [
        "--calib",
        str(text),
        "--calib-samples",
        "4",
        "--calib-seqlen",
        "32",
        "--device",
        "cpu",
        "--candidates",
        "3,4,6",
    ]
    assert main(["plan", str(tiny_folder), "--pareto", "--json", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"curve", "uniform"}
    assert [row["label"] for row in shown["uniform"]] == ["3", "4", "6"]
    assert not (Path.cwd() / "plan.yaml").exists()
    both = ["--pareto", "--target-bpw", "4.5", "--html", str(page), "-o", str(tmp_path / "plan.yaml"), "--refine", "1"]
    assert main(["plan", str(tiny_folder), *both, *flags]) == 0
    printed = capsys.readouterr().out
    assert "all 4" in printed
    content = page.read_text()
    assert content.count("<svg") == 2
    assert "model.layers.1.mlp.down_proj" in content
    assert "Predicted KL against real bits" in content

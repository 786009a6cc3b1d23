"""Plans: from a budget to a file to a quantized model, and every sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.allocation import PlanOptions, make_planner, read_plan
from ptq.allocation.planner import _repaired
from ptq.allocation.problem.budget import Budget, further_budgets, held_below, parse_size
from ptq.allocation.problem.candidates import parse_candidates
from ptq.allocation.problem.groups import parse_limit
from ptq.allocation.scores import ScoreValues
from ptq.allocation.scores.cache import ScoreCache
from ptq.errors import UsageError
from ptq.report import Report
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (5, 16), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 1, "none")
BASE = Scheme(group_size=16)


def planned(model: Any, target: float = 4.5, **options: Any) -> ptq.Plan:
    settings = PlanOptions(**{"base": BASE, "candidates": "2,3,4,6", **options})
    return ptq.plan(model, target_bpw=target, options=settings, calibration=CALIBRATION, device="cpu", cache=None)


def test_a_plan_meets_its_budget_in_real_bits_and_its_quantized_model_has_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = planned(model)
    assert 4.3 < plan.about["bits_per_weight"] <= 4.5
    assert len(plan.linears) == 14
    assert len(plan.formats) >= 2
    assert plan.about["predicted_kl"] > 0
    assert plan.about["measured_kl"] > 0
    plan.save(tmp_path / "plan.yaml")
    again = ptq.Plan.load(tmp_path / "plan.yaml")
    assert again == plan
    report = ptq.quantize(model, again.recipe(ptq.Recipe(method="rtn")), out=tmp_path / "OUT", device="cpu")
    assert report.totals["bits_per_weight"] == pytest.approx(plan.about["bits_per_weight"], abs=1e-4)
    stored = [load_file(file) for file in (tmp_path / "OUT").glob("*.safetensors")]
    assert sum(tensor.nbytes for part in stored for tensor in part.values()) == plan.about["file_bytes"]


def test_the_command_plans_and_quantizes_from_the_file(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on. " * 200)
    file = tmp_path / "plan.yaml"
    common = ["--calib", str(text), "--calib-samples", "4", "--calib-seqlen", "32", "--device", "cpu"]
    sizes = ["--candidates", "3,4,6", "--limit", "*.down_proj>=4"]
    assert main(["plan", str(tiny_folder), "--target-bpw", "4.5", "-o", str(file), *common, *sizes, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == yaml.safe_load(file.read_text())
    assert all(label != "3" for name, label in shown["linears"].items() if name.endswith("down_proj"))
    out = tmp_path / "OUT"
    assert main(["quantize", str(tiny_folder), "--method", "rtn", "--plan", str(file), "-o", str(out)]) == 0
    bits = {row.name: row.scheme["bits"] for row in Report.load(out).layers}
    assert bits == {name: int(label) for name, label in shown["linears"].items()}
    assert (
        main(["plan", str(tiny_folder), "--target-size", "95kB", "-o", str(file), *common, "--solver", "greedy"]) == 0
    )
    assert "used again" not in capsys.readouterr().err  # other candidates, other scores
    assert main(["plan", str(tiny_folder), "--max-kl", "9", "-o", str(file), *common]) == 0
    assert "used again" in capsys.readouterr().err


def test_quantize_plans_by_itself(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on. " * 200)
    flags = ["--calib", str(text), "--calib-samples", "4", "--calib-seqlen", "32", "--target-bpw", "4.5"]
    out = tmp_path / "OUT"
    assert main(["quantize", str(tiny_folder), "--method", "rtn", *flags, "-o", str(out), "--device", "cpu"]) == 0
    assert 4.3 < Report.load(out).totals["bits_per_weight"] <= 4.5


@pytest.mark.parametrize("score", ["lim", "zd", "random"])
def test_scores_that_rank_blocks_give_two_levels(score: str) -> None:
    plan = planned(tiny_model("llama"), 4.5, score=score, candidates="3,4,8")  # 4 + 3 code bits, 1 of scales
    by_block = {name.split(".")[2]: set() for name in plan.linears}
    for name, label in plan.linears.items():
        by_block[name.split(".")[2]].add(label)
    assert sorted(map(sorted, by_block.values())) == [["3"], ["4"]]
    assert "predicted_kl" not in plan.about


def test_half_of_the_blocks_and_one_format_for_all() -> None:
    model, options = tiny_model("llama"), PlanOptions(base=BASE, candidates="3,4", score="zd")
    plan = ptq.plan(model, fraction=0.5, options=options, device="cpu", cache=None)
    assert sorted(plan.linears.values()) == ["3"] * 7 + ["4"] * 7
    assert set(planned(model, 4.9, score="uniform").linears.values()) == {"3"}


def test_experts_of_a_block_share_a_format_and_one_line() -> None:
    plan = planned(tiny_model("qwen3_moe"), 4.5)
    keys = [key for key in plan.linears if "experts" in key]
    assert keys == [f"model.layers.{block}.mlp.experts.*" for block in (0, 1)]


def test_fused_linears_share_a_format() -> None:
    plan = planned(tiny_model("llama"), 4.3, fused=True, candidates="2,3,4,5,6,8")
    for block in (0, 1):
        for module, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            assert len({plan.linears[f"model.layers.{block}.{module}.{name}_proj"] for name in names}) == 1


def test_number_formats_and_full_precision_are_candidates(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = planned(model, 7.0, candidates="3,fp4,bf16")
    assert set(plan.linears.values()) > {"fp4"} or set(plan.linears.values()) == {"fp4", "bf16"}
    report = ptq.quantize(model, plan.recipe(ptq.Recipe(method="rtn")), out=tmp_path / "OUT", device="cpu")
    kept = {name for name, label in plan.linears.items() if label == "bf16"}
    assert {row.name for row in report.layers} == plan.linears.keys() - kept


def test_scores_are_kept_and_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    model, messages = tiny_model("llama"), list[str]()

    def plans(target: float) -> ptq.Plan:
        options = PlanOptions(base=BASE, candidates="3,4,6")
        return ptq.plan(
            model,
            target_bpw=target,
            options=options,
            calibration=CALIBRATION,
            device="cpu",
            cache=tmp_path,
            on_event=lambda event: messages.append(event.text),
        )

    first = plans(5.0)
    assert not any("used again" in text for text in messages)
    assert plans(5.0) == first
    assert any("used again" in text for text in messages)
    (file,) = (tmp_path / "scores").iterdir()
    file.write_text(file.read_text()[:100])
    messages.clear()
    assert plans(5.0) == first
    assert not any("used again" in text for text in messages)


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    values = ScoreValues({"a": [1.0, 2.0]}, {"b": -0.5}, ("note",), {"a": {"trace": 3.0}})
    cache = ScoreCache(tmp_path, {"score": "x"})
    assert cache.read() is None
    assert cache.write(values) is None
    assert cache.read() == values
    assert ScoreCache(tmp_path, {"score": "y"}).read() is None


@pytest.mark.parametrize(
    ("target", "sentence"),
    [(2.0, "below the smallest .* feasible are 3.000 to 7.000"), (9.0, "above the largest .* 3.000 to 7.000")],
)
def test_a_budget_that_cannot_be_met_says_what_can(target: float, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        planned(tiny_model("llama"), target)


def test_other_targets_say_what_is_feasible() -> None:
    model = tiny_model("llama")
    planner = make_planner(model, PlanOptions(base=BASE), calibration=CALIBRATION, device="cpu", cache=None)
    for budget, sentence in (
        (Budget(size=1000), "--target-size .* below the smallest .* MB are kept in full"),
        (Budget(max_kl=1e-12), "below the least predicted KL"),
        (Budget(fraction=0.5), "for scores that rank blocks"),
    ):
        with pytest.raises(UsageError, match=sentence):
            planner.allocate(budget)
    with pytest.raises(UsageError, match="one target"):
        Budget(bpw=3.0, max_kl=1.0)
    with pytest.raises(UsageError, match="above zero"):
        Budget(bpw=float("nan"))
    options = PlanOptions(base=BASE, score="zd")
    with pytest.raises(UsageError, match="predicts KL"):
        ptq.plan(model, max_kl=1.0, options=options, device="cpu", cache=None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": "fischer"}, "fisher"),
        ({"candidates": "2,three"}, "unknown candidate 'three'"),
        ({"candidates": "4,4g16"}, "the same format"),
        ({"candidates": " , "}, "no candidate formats"),
        ({"candidates": "4,12"}, "bits must be a whole number from 2 to 8"),
        ({"limits": ("*.nope>=4",)}, "matches no linear"),
        ({"limits": ("lm_head>=6",)}, "the head are among them only with --include"),
        ({"limits": ("*.v_proj>=6", "*.v_proj<=4")}, "leave model.layers.0.self_attn.v_proj no format"),
        ({"limits": ("v_proj",)}, "PATTERN>=BITS"),
        ({"compute_dtype": "float16"}, "vanish in float16"),
        ({"score": "lim", "candidates": "4"}, "above the largest"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        planned(tiny_model("llama"), 5.5, **options)


PLAN = """formats:
  '3': {bits: 3, group_size: 16}
  '4': {bits: 4, group_size: 16}
linears:
  model.layers.0.self_attn.q_proj: '3'
  model.layers.0.self_attn.k_proj: 3
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no plan"),
        ("scheme: {bits: 3}\n", "use --recipe"),
        (PLAN + "  model.layers.0.self_attn.v_proj: '5'\n", "line 7: .*v_proj: unknown format '5'"),
        (PLAN + "linear: {}\n", "line 7: unknown key of a plan 'linear'"),
        (PLAN.replace("{bits: 4, ", "{bit: 4, "), "line 3: format 4: unknown field of a scheme 'bit'"),
        (PLAN.replace("{bits: 4, ", "{bits: 9, "), "line 3: format 4: bits must be"),
        (PLAN.replace("linears:", "linears: []\nx:"), "is no plan"),
        (PLAN.replace("formats:", "about:"), "mapping 'formats'"),
    ],
)
def test_a_file_that_is_no_plan_says_where(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read_plan(file)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("  model.layers.0.self_attn.w_proj: '3'\n", "line 7: unknown linear .*v_proj"),
        ("  '*.nope': '3'\n", r"line 7: the pattern '\*.nope' matches no linear"),
        ("  '*.v_proj': '3'\n  '*.0.*': '4'\n", "line 8: the patterns .* both match .*v_proj and say '3' and '4'"),
        ("".join(f"  h.{i}.attn: '3'\n" for i in range(3)), "line 7: this plan is for another model"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_says_the_line(rows: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN + rows)
    plan = read_plan(file)
    with pytest.raises(UsageError, match=sentence):
        plan.check(tiny_model("llama"))


def test_names_win_over_patterns_and_the_callers_overrides_over_both(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("linears:", "linears:\n  '*_proj': '4'"))
    plan = read_plan(file)
    plan.check(tiny_model("llama"))
    mine = Scheme(bits=8)
    recipe = plan.recipe(ptq.Recipe(overrides=(("*.0.self_attn.k_proj", mine),), scheme=Scheme(act_bits=8)))
    found = {name: recipe.scheme_for(f"model.layers.0.self_attn.{name}_proj") for name in "qkv"}
    assert {name: scheme.bits for name, scheme in found.items() if scheme} == {"q": 3, "k": 8, "v": 4}
    assert found["v"] is not None
    assert found["v"].act_bits == 8


def test_a_plan_of_other_weights_is_used_and_said(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("about: {fingerprint: abc, model: other}\n" + PLAN)
    flags = ["--method", "rtn", "--bits", "8", "--plan", str(file), "-o", str(tmp_path / "OUT"), "--dry-run"]
    assert main(["quantize", str(tiny_folder), *flags]) == 0
    said = capsys.readouterr().err
    assert "other weights of the same structure" in said
    assert "12 linears are not in the plan and get int8 sym g64" in said
    assert main(["quantize", str(tiny_folder), *flags, "--target-bpw", "4"]) == 2
    assert main(["quantize", str(tiny_folder), "--score", "lim"]) == 2


def test_scores_that_are_no_numbers_are_repaired_and_said() -> None:
    nan = float("nan")
    table, notes = _repaired({"a": [1.0, nan], "b": [-0.5, 0.25], "c": [3.0, 0.5]})
    assert table == {"a": [1.0, 0.5], "b": [0.0, 0.25], "c": [3.0, 0.5]}
    assert [("not finite" in note, "negative" in note) for note in notes] == [(True, False), (False, True)]
    assert [note.split("e.g. ")[1][0] for note in notes] == ["a", "b"]
    with pytest.raises(UsageError, match="not finite for any linear"):
        _repaired({"a": [nan], "b": [nan]})


def test_small_parsers() -> None:
    assert [parse_size(text) for text in ("90MB", "1.5 GiB", "12")] == [90_000_000, 3 << 29, 12]
    with pytest.raises(UsageError, match="90MB"):
        parse_size("ninety")
    assert parse_limit("*.down_proj >= 4") == ("*.down_proj", ">=", 4)
    labels = {c.label: c.scheme for c in parse_candidates("3g32asym,8g0,bf16", BASE)}
    assert labels["3g32asym"] == Scheme(bits=3, group_size=32, symmetric=False)
    assert labels["8g0"] == Scheme(bits=8, group_size=None)
    assert labels["bf16"] is None


def test_a_tokenizer_is_needed_with_a_model_in_memory(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        ptq.plan(tiny_model("llama"), target_bpw=4, device="cpu", cache=None)


def test_a_limit_of_bit_operations_that_decides_is_said_and_kept_by_refinement() -> None:
    model = tiny_model("llama")
    options = PlanOptions(base=BASE, candidates="2,3,4,6")
    planner = make_planner(model, options, calibration=CALIBRATION, device="cpu", cache=None)
    budget = Budget(bpw=5.5, bitops=0.1)
    plan, _ = planner.planned(budget, check=False)
    (note,) = [text for text in plan.about["notes"] if "bitops" in text]
    assert note.startswith(f"--bitops 0.1 holds the plan at {plan.about['bits_per_weight']:.3f} bits per weight")
    table = planner.table
    ((costs, limit),) = further_budgets(table, budget)
    _, refined = planner.planned(budget, check=False, rounds=1)
    assert costs[range(len(refined.choice)), refined.choice].sum() <= limit * (1 + 1e-9)
    _, smallest = planner.planned(Budget(max_kl=0.02, bitops=0.1), check=False)
    assert costs[range(len(smallest.choice)), smallest.choice].sum() <= limit * (1 + 1e-9)
    assert held_below(table, Budget(bpw=4.0, bitops=1.0), 0, planner.allocate(Budget(bpw=4.0, bitops=1.0))) is None


@pytest.mark.parametrize(
    ("budget", "options", "rounds", "sentence"),
    [
        ({"fraction": 0.5}, {}, 0, "for scores that rank blocks"),
        ({"max_kl": 0.1}, {"score": "hawq-eig"}, 0, "'hawq-eig' is no KL"),
        ({"bpw": 5.0, "bitops": 0.5}, {"score": "zd"}, 0, "'zd' only ranks blocks"),
        ({"bpw": 5.0}, {"score": "lim"}, 1, "--refine needs a score in nats"),
        ({"bpw": 5.0}, {}, -1, "0 or more; got -1"),
    ],
)
def test_what_a_score_cannot_serve_is_said_before_it_is_computed(
    budget: Any, options: Any, rounds: int, sentence: str
) -> None:
    chosen = PlanOptions(base=BASE, **options)
    planner = make_planner(tiny_model("llama"), chosen, calibration=CALIBRATION, device="cpu", cache=None)
    object.__setattr__(planner, "score", lambda: pytest.fail("scored"))
    with pytest.raises(UsageError, match=sentence):
        planner.planned(Budget(**budget), rounds=rounds)


def test_arguments_of_another_type_are_refused_and_a_size_may_have_a_unit() -> None:
    with pytest.raises(UsageError, match=r"bpw is a number, got '4' \(str\)"):
        ptq.plan(tiny_model("llama"), target_bpw="4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing to choose"):
        Budget(fraction=0.5, bitops=0.5)
    for fields, sentence in (
        ({"candidates": (3, 4)}, "one text with commas"),
        ({"limits": "*.down_proj>=4"}, "limits is a tuple of texts"),
        ({"probes": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=sentence):
            PlanOptions(**fields)
    options = PlanOptions(base=BASE, score="uniform", candidates="2,3,4")
    plan = ptq.plan(
        tiny_model("llama"), target_size="140kB", options=options, calibration=CALIBRATION, device="cpu", cache=None
    )
    assert plan.about["file_bytes"] <= 140_000

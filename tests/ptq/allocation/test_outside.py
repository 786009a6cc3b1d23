"""The embedding and the head as candidates: plans, files, the packed modules, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import ptq
from calib.data.tokens import Calibration
from ptq.allocation import PlanOptions, make_planner, recipe_from_plan
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.budget import Budget
from ptq.allocation.problem.candidates import Candidate, rounding_errors
from ptq.errors import UsageError
from ptq.methods import find_method, make_config
from ptq.runtime.embedding import QuantEmbedding, TiedHead, finds_rows
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (4, 12), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 5, "none")
BASE = Scheme(bits=8, group_size=32)


def packed(scheme: Scheme, rows: int = 50, columns: int = 64) -> tuple[QuantEmbedding, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    method: Any = find_method("rtn")
    shared = scheme.number_format.share([weight], scheme)
    found = method.quantize(weight, None, scheme, make_config(method, {}), shared).weight
    module = QuantEmbedding(rows, columns, scheme, dtype=torch.float32)
    for key, tensor in found.tensors().items():
        setattr(module, key, tensor)
    return module, found.dequantize()


@pytest.mark.parametrize("name", ["3", "8", "nvfp4", "fp8", "mxfp4"])
def test_rows_are_those_of_the_whole_weight_and_the_tied_head_multiplies_by_it(name: str) -> None:
    scheme = Scheme(bits=int(name), group_size=32) if name.isdigit() else Scheme.of(name)
    module, weight = packed(scheme.resolved(torch.float16))
    ids = torch.tensor([[4, 49, 0], [4, 4, 17]])
    torch.testing.assert_close(module(ids), weight[ids])
    x = torch.randn(2, 64)
    torch.testing.assert_close(TiedHead(module)(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert [key for key, _ in TiedHead(module).named_buffers()] == []


def test_zero_points_of_neighbours_share_words_so_an_asymmetric_table_is_refused() -> None:
    assert finds_rows(Scheme(bits=4, scale_dtype="float16"), 400, 64)
    assert not finds_rows(Scheme(bits=4, symmetric=False, scale_dtype="float16"), 400, 64)


@pytest.mark.parametrize(
    ("family", "tied", "names"),
    [
        ("llama", True, ["model.embed_tokens"]),
        ("llama", False, ["model.embed_tokens", "lm_head"]),
        ("gpt2", True, ["transformer.wte"]),
    ],
)
def test_what_is_named_in_full_is_stored_once_and_loads(
    family: str, tied: bool, names: list[str], tmp_path: Path
) -> None:
    tiny_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    recipe = ptq.Recipe(method="rtn", scheme=BASE, overrides=tuple((name, BASE) for name in names))
    forecast = ptq.forecast(tmp_path / "model", recipe, out=tmp_path / "OUT", device="cpu")
    report = ptq.quantize(tmp_path / "model", recipe, out=tmp_path / "OUT", device="cpu")
    assert report.container == "native"
    assert sorted(names) == sorted(
        row.name for row in report.layers if ".layers." not in row.name and ".h." not in row.name
    )
    assert not any(kept.reason in ("the embedding", "the head") for kept in report.kept)
    assert sum(row.payload_bytes for row in report.layers) == forecast.payload_bytes
    model = ptq.load(tmp_path / "OUT", dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead) == tied
    with torch.no_grad():
        found, expected = model(input_ids=TOKENS).logits, full(input_ids=TOKENS).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
    with torch.no_grad():
        inner = AutoModel.from_pretrained(tmp_path / "OUT", dtype=torch.float32)(input_ids=TOKENS)
        own = getattr(model, model.base_model_prefix)(input_ids=TOKENS)
    torch.testing.assert_close(inner.last_hidden_state, own.last_hidden_state)
    model.save_pretrained(tmp_path / "AGAIN")
    with torch.no_grad():
        torch.testing.assert_close(ptq.load(tmp_path / "AGAIN", dtype=torch.float32)(TOKENS).logits, found)
    assert model.generate(TOKENS[:1], max_new_tokens=2, do_sample=False).shape == (1, 14)


def test_the_embedding_and_the_head_are_scored_by_the_kl_they_cost_and_the_file_has_the_planned_size(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    options = PlanOptions("3,6,8", BASE, include=("embedding", "lm_head"))
    planner = make_planner(tmp_path / "model", options, calibration=CALIBRATION, device="cpu", cache=None)
    plan, _allocation = planner.planned(Budget(bpw=5.5))
    assert "model.embed_tokens" in plan.linears
    assert plan.about["include"] == ["model.embed_tokens"]
    row = planner.score().table["model.embed_tokens"]
    expected = []
    for candidate in planner.setting.candidates:
        other = tiny_model("llama")
        weight = other.get_input_embeddings().weight
        with torch.no_grad():
            weight += next(iter(rounding_errors(weight.detach().float(), (Candidate("", candidate.scheme),))))
            logits = [m(input_ids=planner.setting.calibration.tokens).logits for m in (model, other)]  # type: ignore[union-attr]
        expected.append(float(token_kl(*logits).mean()))
    assert row == pytest.approx(expected, rel=1e-2)
    assert row[0] > row[1] > row[2] > 0
    recipe = recipe_from_plan(plan, tmp_path / "model", ptq.Recipe(method="rtn"))
    forecast = ptq.forecast(tmp_path / "model", recipe, out=tmp_path / "OUT", device="cpu")
    assert forecast.file_bytes == pytest.approx(plan.about["file_bytes"], rel=0.02)
    assert forecast.bits_per_weight == pytest.approx(plan.about["bits_per_weight"], abs=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")

    def planner(**fields: Any) -> Any:
        return make_planner(model, PlanOptions(base=BASE, **fields), calibration=CALIBRATION, device="cpu", cache=None)

    with pytest.raises(UsageError, match="which the score 'lim' is no sum with"):
        planner(include=("embedding",), score="lim")
    with pytest.raises(UsageError, match="unknown part for --include 'head'"):
        planner(include=("head",))
    with pytest.raises(UsageError, match="can have none of the candidates 4asym, itq3s"):
        planner(include=("embedding",), candidates="4asym,itq3s")
    with pytest.raises(UsageError, match="leave out --include"):
        planner(include=("embedding",), candidates="3,4").planned(Budget(bpw=4), rounds=1)

    def quantize(name: str, scheme: Scheme = BASE, **fields: Any) -> None:
        recipe = ptq.Recipe(method="rtn", scheme=BASE, overrides=((name, scheme),), **fields)
        ptq.quantize(model, recipe, out=tmp_path / "OUT", device="cpu", tokenizer=tiny_tokenizer)

    with pytest.raises(UsageError, match=r"lm_head has no weight of its own.*name model\.embed_tokens"):
        quantize("lm_head")
    with pytest.raises(UsageError, match="the container compressed-tensors cannot carry"):
        quantize("model.embed_tokens", container="compressed-tensors")
    with pytest.raises(UsageError, match="rows cannot be read one by one"):
        quantize("model.embed_tokens", Scheme(bits=4, symmetric=False, group_size=32))

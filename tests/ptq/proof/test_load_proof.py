"""The proof that an output will load: skeletons, the process without ptq, verdicts, and what the report says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ptq
from calib.checkpoint.reader import ModelSource, open_model
from ptq.containers.vllm import vllm_problem
from ptq.errors import ModelError, UsageError
from ptq.pipeline.preparation.schemes.scheme_assignment import make_plan
from ptq.proof import FormatChoice, settle, settle_format, verdicts
from ptq.proof.loader import try_to_load
from ptq.proof.prover import StockProver
from ptq.proof.skeleton import Skeleton, make_skeleton
from ptq.proof.verdicts import Verdict
from ptq.recipe import Recipe
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

OLMO_HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SYM, ASYM = Scheme(4, group_size=16), Scheme(4, symmetric=False, group_size=16)


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test finds its verdicts itself."""
    monkeypatch.setattr(verdicts, "_remembered", {})
    monkeypatch.setenv("PTQ_CACHE", str(tmp_path / "cache"))


def stored(folder: Path, family: str, **changes: Any) -> ModelSource:
    tiny_model(family, torch.bfloat16, **changes).save_pretrained(folder)
    return open_model(str(folder))


def choose(source: ModelSource, scheme: Scheme = SYM, requested: str = "auto") -> FormatChoice:
    plan = make_plan(source.skeleton, Recipe(scheme=scheme), source.dtype)
    return settle_format(requested, plan.schemes, source, None)


def skeleton_of(source: ModelSource, folder: Path, recipe: Recipe) -> Skeleton:
    made = make_skeleton(source, make_plan(source.skeleton, recipe, source.dtype).schemes, folder)
    assert isinstance(made, Skeleton), made
    return made


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_what_stock_transformers_loads_is_said_to_be_checked(tmp_path: Path) -> None:
    choice = choose(stored(tmp_path / "model", "llama"))
    assert choice.name == "compressed-tensors"
    assert "loads it (checked, with equal logits); not every version of vLLM reads it (groups of 16" in choice.reason
    assert choice.proofs == {"compressed-tensors": Verdict(True, None, "compared", False, 2)}


@pytest.mark.parametrize("family", ["falcon", "gpt_bigcode"])
def test_a_family_that_stock_transformers_cannot_load_is_native(family: str, tmp_path: Path) -> None:
    source = stored(tmp_path / "model", family)
    choice = choose(source)
    assert choice.name == "native"
    assert "does not load it: AttributeError: " in choice.reason
    assert choice.proofs["native"] == Verdict(True, None, "compared", False, 2)
    with pytest.raises(UsageError, match=r"does not load it: AttributeError.*Use --container native or auto"):
        choose(source, requested="compressed-tensors")


def test_merges_of_dense_tensors_beside_packed_ones(tmp_path: Path) -> None:
    """OLMo-Hybrid: stock transformers unpacks what it merges and finds nothing; with ptq both formats load."""
    model = tiny_olmo_hybrid()
    model.save_pretrained(tmp_path / "olmo")
    report = ptq.quantize(tmp_path / "olmo", method="rtn", bits=4, group_size=16, out=tmp_path / "out")
    assert report.container == "native"
    assert "conversion of the weights" in report.container_reason
    made = skeleton_of(open_model(str(tmp_path / "olmo")), tmp_path / "skeleton", Recipe(scheme=SYM))
    made.write("compressed-tensors", tmp_path / "packed", None)
    for folder, full in ((tmp_path / "out", tmp_path / "olmo"), (tmp_path / "packed", tmp_path / "skeleton")):
        loaded, wanted = ptq.load(folder), AutoModelForCausalLM.from_pretrained(full)
        name = "model.layers.0.linear_attn.conv1d.weight"
        assert torch.equal(loaded.get_parameter(name), wanted.get_parameter(name))


def tiny_olmo_hybrid() -> Any:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    config = OlmoHybridConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=1,
        **OLMO_HYBRID,
    )
    return OlmoHybridForCausalLM(config).to(torch.bfloat16)


def test_what_does_not_load_at_all_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "model", "llama")
    monkeypatch.setattr(settle, "try_to_load", lambda folder, **_: broken if "native" in folder else fine)
    fine, broken = {"problem": None, "forward": "ran"}, {"problem": "1 missing keys: x", "forward": "not run"}
    with pytest.raises(ModelError, match=r"does not load with `import ptq`.*1 missing keys: x"):
        ptq.quantize(tmp_path / "model", method="rtn", bits=4, symmetric=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_full_precision_does_as_well_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(tmp_path / "model", "llama")
    monkeypatch.setattr(settle, "try_to_load", lambda **_: {"problem": "1 unexpected keys: x", "forward": "not run"})
    assert choose(source, ASYM).proofs["native"].loads is True


def test_kernels_that_clash_find_their_native_proof(tmp_path: Path) -> None:
    """Where schemes differ, the first block may still ask for the native format."""
    source = stored(tmp_path / "model", "llama")
    recipe = Recipe(scheme=SYM, overrides=(("*.v_proj", Scheme(8, group_size=16)),))
    plan = make_plan(source.skeleton, recipe, source.dtype)
    choice = settle_format("auto", plan.schemes, source, None)
    assert choice.name == "compressed-tensors"
    assert choice.native_instead("one kernel").name == "native"
    broken = dataclasses.replace(choice, proofs={"native": Verdict(False, "1 missing keys: x")})
    with pytest.raises(ModelError, match="one kernel"):
        broken.native_instead("one kernel")


def test_a_class_of_the_users_own_is_native_and_said_not_to_be_tried() -> None:
    class Own(LlamaForCausalLM):
        pass

    class OwnConfig(LlamaConfig):
        model_type = "own"

    Own.config_class = OwnConfig
    config = OwnConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    choice = choose(open_model(Own(config)))
    assert choice.name == "native"
    assert "it could not be tried" in choice.reason
    assert choice.proofs["native"].loads is None


# -- skeletons ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model of six million parameters: large enough for a smaller skeleton."""
    folder = tmp_path_factory.mktemp("large") / "model"
    changes = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4000}
    return stored(folder, "llama", **changes)


def test_a_skeleton_has_one_block_of_every_kind(large: ModelSource, tmp_path: Path) -> None:
    made = skeleton_of(large, tmp_path / "one", Recipe(scheme=SYM))
    assert (made.blocks, made.shrunk, made.runs) == (1, True, True)
    assert set(made.schemes) < set(make_plan(large.skeleton, Recipe(), large.dtype).schemes)
    assert sum(p.numel() for p in made.source.skeleton.parameters()) < 200_000
    recipe = Recipe(scheme=SYM, overrides=(("*.3.mlp.down_proj", Scheme(8)),))
    made = skeleton_of(large, tmp_path / "four", recipe)
    assert made.blocks == 4
    assert made.schemes["model.layers.3.mlp.down_proj"] == Scheme(8, scale_dtype="bfloat16")


def test_input_blocks_wider_than_the_skeleton_are_no_obstacle(tmp_path: Path) -> None:
    source = stored(tmp_path / "source", "llama", hidden_size=128, intermediate_size=256, vocab_size=40_000)
    assert skeleton_of(source, tmp_path / "small", Recipe()).shrunk
    assert choose(source, Scheme.of("fp8-block", act_format="fp8-block")).name == "compressed-tensors"


@pytest.mark.parametrize("name", ["itq3s", "itq3s-ternary", "higgs", "mxfp4"])
def test_formats_with_groups_of_one_size_have_a_skeleton(name: str, large: ModelSource, tmp_path: Path) -> None:
    made = skeleton_of(large, tmp_path / "small", Recipe(scheme=Scheme.of(name)))
    assert made.shrunk
    groups = {scheme.group_size for scheme in made.schemes.values() if scheme is not None}
    assert groups == {Scheme.of(name).group_size}


@pytest.mark.parametrize(("name", "kept"), [("q3_k", "iq4_nl"), ("q4_k", "int")])
def test_blocks_wider_than_the_skeleton_are_no_obstacle(
    name: str, kept: str, large: ModelSource, tmp_path: Path
) -> None:
    made = skeleton_of(large, tmp_path / "small", Recipe(scheme=Scheme.of(name)))
    assert made.shrunk
    assert {scheme.format for scheme in made.schemes.values() if scheme is not None} == {kept}
    assert made.write("native", tmp_path / "native", None) is not None


def test_a_shrunk_skeleton_stands_for_the_model(large: ModelSource) -> None:
    choice = choose(large)
    assert choice.name == "compressed-tensors"
    assert choice.proofs["compressed-tensors"] == Verdict(True, None, "compared", True, 1)


def test_what_has_no_skeleton_is_not_said_to_load(
    large: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(config: Any, *_: Any, **__: Any) -> Any:
        return {**config, "num_hidden_layers": 1, "attention_bias": True}

    monkeypatch.setattr("ptq.proof.skeleton.shrink_config", other)
    choice = choose(large)
    assert choice.name == "native"
    assert "could not be tried" in choice.reason
    assert "its blocks would be others" in choice.reason


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A skeleton in the native format, and the request to load it."""
    root = tmp_path_factory.mktemp("packed")
    made = skeleton_of(stored(root / "model", "llama"), root / "full", Recipe(scheme=ASYM))
    expected = made.write("native", root / "native", None)
    request = {"loader": "AutoModelForCausalLM", "tokens": made.tokens, "expected": str(expected)}
    return root / "native", request


def changed(packed: tuple[Path, dict[str, Any]], folder: Path, change: Any) -> dict[str, Any]:
    source, request = packed
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return try_to_load(folder=str(folder), **request)


def test_the_loader_sees_what_is_lost_added_or_wrong(packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight_scale"
    assert changed(packed, tmp_path / "same", lambda t: None) == {"problem": None, "forward": "compared"}
    assert f"missing keys: {key}" in changed(packed, tmp_path / "lost", lambda t: t.pop(key))["problem"]
    more = changed(packed, tmp_path / "more", lambda t: t.update({"more": torch.zeros(1)}))
    assert "1 unexpected keys: more" in more["problem"]
    wrong = changed(packed, tmp_path / "wrong", lambda t: t.update({key: t[key].flip(0)}))
    assert "logits are off by" in wrong["problem"]
    nan = changed(packed, tmp_path / "nan", lambda t: t.update({key: t[key] * torch.nan}))
    assert nan["problem"] == "its logits are not finite"


def test_a_process_that_imports_ptq_finds_what_was_found_here(packed: tuple[Path, dict[str, Any]]) -> None:
    folder, request = packed
    code = (
        "import json, sys, ptq; from ptq.proof.loader import try_to_load\n"
        "print(json.dumps(try_to_load(**json.loads(sys.argv[1]))))"
    )
    argument = json.dumps(request | {"folder": str(folder)})
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == try_to_load(folder=str(folder), **request)


def test_the_other_process_has_no_ptq(packed: tuple[Path, dict[str, Any]], one_prover: StockProver) -> None:
    """It meets the guards of a native folder, which `import ptq` takes away."""
    folder, request = packed
    assert "packed by ptq" in one_prover.try_to_load(**request, folder=str(folder))["problem"]


def test_a_process_that_cannot_load_is_a_problem_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with StockProver() as prover:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        assert "ended with exit code 1" in prover.try_to_load(folder="x")["problem"]
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        assert "no process could be started" in prover.try_to_load(folder="x")["problem"]


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_verdict_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(tmp_path / "model", "llama")
    first = choose(source)

    def never() -> contextlib.AbstractContextManager[StockProver]:
        raise AssertionError("tried again")

    monkeypatch.setattr(settle, "stock_prover", never)
    assert choose(source) == first  # this process remembers
    monkeypatch.setattr(verdicts, "_remembered", {})
    assert choose(source) == first  # the cache remembers
    (file,) = (tmp_path / "cache" / "proofs").iterdir()
    for text in ("{", '{"loads": true, "more": 1}', "[]"):
        monkeypatch.setattr(verdicts, "_remembered", {})
        file.write_text(text)
        with pytest.raises(AssertionError, match="tried again"):
            choose(source)
    with pytest.raises(AssertionError, match="tried again"):
        choose(source, Scheme(8, group_size=16))  # another output


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTQ_CACHE", str(tmp_path / "file"))
    assert choose(stored(tmp_path / "model", "llama"), ASYM).name == "native"


def test_the_report_says_which_proof_ran(tmp_path: Path) -> None:
    stored(tmp_path / "model", "llama")
    report = ptq.quantize(tmp_path / "model", method="rtn", bits=4, group_size=16, out=tmp_path / "out")
    assert report.environment["proofs"] == {
        "compressed-tensors": {
            "loads": True,
            "problem": None,
            "forward": "compared",
            "shrunk": False,
            "blocks": 2,
        }
    }


# -- vLLM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shape", "problem"),
    [
        (Scheme(4, group_size=128), (64, 256), None),
        (Scheme(8, group_size=None), (128, 128), None),
        (Scheme(3, group_size=64), (64, 128), "3 bits; all read 4 and 8"),
        (Scheme(4, group_size=16), (64, 128), "groups of 16"),
        (Scheme(4, group_size=32), (64, 96), "a is 64 x 96"),
        (Scheme(4, group_size=32), (96, 128), "a is 96 x 128"),
    ],
)
def test_what_vllm_reads(scheme: Scheme, shape: tuple[int, int], problem: str | None) -> None:
    found = vllm_problem({"b": None, "a": scheme}, {"a": torch.nn.Linear(shape[1], shape[0])})
    assert found is None if problem is None else found is not None and problem in found

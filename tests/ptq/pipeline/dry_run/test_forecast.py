"""The forecast: sizes are exact, nothing is written, and what a run refuses it refuses before it computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq
import ptq.pipeline.preparation.preflight as preflight
from calib.data.tokens import Calibration
from calib.model.input_groups import InputGroup
from ptq.errors import OutputError, UsageError
from ptq.pipeline.preparation.schemes.scheme_assignment import make_plan
from ptq.recipe import Recipe
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (8, 24), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "deepseek_v3", "gemma3n_text"])
@pytest.mark.parametrize("method", ["rtn", "coreq"])
def test_sizes_are_those_of_the_run(family: str, method: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"method": method, "group_size": 16, "symmetric": False, "calibration": CALIBRATION}
    before = ptq.forecast(tmp_path / "model", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    after = ptq.quantize(tmp_path / "model", out=tmp_path / "out", **options)
    assert before.linears == len(after.layers)
    assert before.quantized_parameters == after.totals["quantized_parameters"]
    assert before.kept_parameters == after.totals["kept_parameters"]
    assert before.payload_bytes == after.totals["payload_bytes"]
    assert before.kept_bytes == after.totals["kept_bytes"]
    assert before.bits_per_weight == pytest.approx(after.totals["bits_per_weight"])
    assert {(t.name, t.reason, t.bytes) for t in before.kept} == {(t.name, t.reason, t.bytes) for t in after.kept}
    assert before.container == after.container
    headers = after.totals["file_bytes"] - before.file_bytes
    assert 0 < headers < 300 * (before.linears + 40) * 4  # a header names every tensor
    assert set(before.timing) >= {"read", "solve", "write"}
    assert before.seconds == pytest.approx(sum(before.timing.values()))
    assert before.peak_memory > 1e8


def test_the_calibration_and_shared_kernels_are_told(tmp_path: Path) -> None:
    forecast = ptq.forecast(tiny_model("llama"), out=tmp_path / "out", group_size=16, calibration=CALIBRATION)
    assert forecast.calibration == {"sequences": 8, "seqlen": 24, "batches": 8}
    assert forecast.lockstep
    assert tuple(tuple(n.rpartition(".")[2] for n in group) for group in forecast.shared) == (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )


def test_a_full_disk_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match=r"will need .* MB free: free space"):
        ptq.quantize(tiny_model("llama"), out=tmp_path / "out", method="rtn")
    forecast = ptq.forecast(tiny_model("llama"), out=tmp_path / "out", method="rtn")
    assert any("the disk has" in warning for warning in forecast.warnings)


def test_fused_kernels_must_share_a_scheme_in_the_format_that_they_read(tmp_path: Path) -> None:
    overrides = (("*.1.self_attn.v_proj", Scheme(bits=4, group_size=16)),)
    base = Recipe(method="rtn", scheme=Scheme(bits=3, group_size=16), overrides=overrides)
    report = ptq.quantize(tiny_model("llama"), base, out=tmp_path / "auto")
    assert report.container == "native"
    assert "v_proj (int4 sym g16)" in report.container_reason
    strict = Recipe(method="rtn", scheme=base.scheme, overrides=overrides, container="compressed-tensors")
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj .* one kernel"):
        ptq.quantize(tiny_model("llama"), strict, out=tmp_path / "strict")
    model = tiny_model("llama")
    logits = ptq.load(tmp_path / "auto")(input_ids=TOKENS[:1]).logits
    assert logits.shape == model(input_ids=TOKENS[:1]).logits.shape


def test_only_linears_of_one_module_and_experts_are_one_kernel() -> None:
    groups = [
        InputGroup(("attn.q", "attn.k", "mlp.up")),
        InputGroup(("mlp.experts.0.up",), 1, "mlp.experts", "mlp.experts.0"),
        InputGroup(("mlp.experts.1.up",), 1, "mlp.experts", "mlp.experts.1"),
    ]
    three, four = Scheme(bits=3), Scheme(bits=4)

    def clashes(**schemes: Scheme) -> list[str]:
        names = {"q": "attn.q", "k": "attn.k", "up": "mlp.up", "e0": "mlp.experts.0.up", "e1": "mlp.experts.1.up"}
        by_name: dict[str, Scheme | None] = {f"b.{names[key]}": schemes.get(key, three) for key in names}
        return preflight.clashing_schemes(make_plan_of(by_name), groups)

    assert clashes() == []
    assert clashes(up=four) == []  # another module: no runtime fuses it with attention
    assert len(clashes(k=four)) == 1
    assert len(clashes(e1=four)) == 1
    assert len(clashes(q=four, e0=four)) == 2


def make_plan_of(schemes: dict[str, Scheme | None]) -> Any:
    plan = make_plan(tiny_model("llama"), Recipe(method="rtn"), torch.float32)
    return type(plan)(("b",), schemes, {})


def test_nothing_is_written_even_with_activations_on_disk_and_beside_a_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 16, "calibration": CALIBRATION, "offload": "disk"}
    model = tiny_model("llama")
    ptq.forecast(model, out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()

    def listen(event: ptq.Event) -> None:
        if event.kind == "layer" and "layers.1." in event.name:
            files = {path: path.read_bytes() for path in (tmp_path / "live").rglob("*.bin")}
            assert files
            ptq.forecast(model, out=tmp_path / "live", **options)
            assert {path: path.read_bytes() for path in (tmp_path / "live").rglob("*.bin")} == files

    ptq.quantize(model, out=tmp_path / "live", on_event=listen, **options)
    assert (tmp_path / "live" / "config.json").exists()


def test_ignored_blocks_are_not_what_is_measured(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    recipe = Recipe(scheme=Scheme(bits=3, group_size=16), ignore=("*.layers.[01].*",))
    forecast = ptq.forecast(model, recipe, out=tmp_path, calibration=CALIBRATION)
    assert forecast.timing["solve"] > 0
    assert forecast.timing["statistics"] > 0


def test_sizes_are_those_of_the_stored_dtypes(tmp_path: Path) -> None:
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: t.float() if "norm" in name or "embed" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    forecast = ptq.forecast(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=16)
    report = ptq.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=16)
    assert forecast.kept_bytes == report.totals["kept_bytes"]


def test_a_clash_in_a_later_kind_of_block_is_seen_before_the_run(tmp_path: Path) -> None:
    recipe = Recipe(
        "rtn", scheme=Scheme(bits=3, group_size=16), overrides=(("*.k_proj", Scheme(bits=8, group_size=16)),)
    )
    model = tiny_model("lfm2")  # whose first block has no attention
    report = ptq.quantize(model, recipe, out=tmp_path / "out")
    assert report.container == "native"
    assert "k_proj (int8 sym g16)" in report.container_reason
    with pytest.raises(UsageError, match=r"k_proj.*--container native"):
        ptq.quantize(model, dataclasses.replace(recipe, container="compressed-tensors"), out=tmp_path / "strict")

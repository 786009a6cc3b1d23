"""Export of finished results to folders: the same weights, the same logits, targets that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptq
from calib.checkpoint.reader import open_model
from cli.main import main
from ptq.checkpoint.writer import CheckpointWriter
from ptq.errors import OutputError, UsageError
from ptq.export import EXPORT_FORMATS, export
from ptq.export.dense import dense_weight
from ptq.quantized import QuantizedWeight
from ptq.report import Report
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model


def quantized(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    arguments: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu", **fields}
    ptq.quantize(tiny_model(family, dtype), out=folder, **arguments)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = torch.nn.Module.float(model)(torch.arange(12).reshape(2, 6)).logits
    return result


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "asymmetric": ("llama", {"symmetric": False}),
    "Conv1D": ("gpt2", {}),
    "experts": ("qwen3_moe", {"container": "native"}),
    "rotated inputs": ("llama", {"format": "itq3s", "bits": 3, "group_size": 256}),
    "rotated residual stream": ("llama", {"rotate": ("residual", "down")}),
    "biases": ("qwen2", {"container": "compressed-tensors"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dequantized_folder_is_the_same_model(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    source = quantized(tmp_path / "out", family, torch.float32, **fields)
    report = export(source, format="f32", out=tmp_path / "f32")
    assert report.container == "f32"
    config = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(found), logits(ptq.load(source)), atol=2e-4, rtol=1e-4)


def test_bf16_rounds_the_weights_and_nothing_else(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out")
    export(source, format="bf16", out=tmp_path / "bf16")
    tensors, wanted = stored(tmp_path / "bf16"), ptq.load(source)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    linear: Any = wanted.model.layers[0].mlp.down_proj
    assert torch.equal(tensors["model.layers.0.mlp.down_proj.weight"], linear.dequantize().bfloat16())
    assert torch.equal(tensors["model.norm.weight"], wanted.model.norm.weight)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "native"])
def test_another_container_has_the_bytes_of_a_direct_run(target: str, tmp_path: Path) -> None:
    source = quantized(tmp_path / "out", container="native" if target != "native" else "gptq")
    export(source, format=target, out=tmp_path / "exported")
    direct = quantized(tmp_path / "direct", container=target)
    found, wanted = stored(tmp_path / "exported"), stored(direct)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "exported", direct)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {p.name for p in direct.iterdir()}


def test_an_exported_folder_is_a_result_again(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out", symmetric=False)
    export(source, format="gptq", out=tmp_path / "gptq")
    export(tmp_path / "gptq", format="native", out=tmp_path / "native")
    assert torch.equal(logits(ptq.load(tmp_path / "native")), logits(ptq.load(source)))
    opened = open_model(tmp_path / "gptq")
    assert opened.quantization is not None
    assert opened.quantization.method == "gptq"


def test_what_a_container_cannot_carry_is_refused(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out", bits=3, symmetric=False)
    with pytest.raises(UsageError, match="zero points of 3 bits"):
        export(source, format="compressed-tensors", out=tmp_path / "ct")
    with pytest.raises(UsageError, match="Did you mean"):
        export(source, format="gptq_", out=tmp_path / "x")
    assert not (tmp_path / "ct").exists()


def test_what_is_proposed_for_a_family_without_gguf_is_possible(tmp_path: Path) -> None:
    for family, advice in {"gpt_oss": "convert the model in full precision", "gpt2": "--format f16"}.items():
        source = quantized(tmp_path / family, family, container="native")
        with pytest.raises(UsageError, match=advice):
            export(source, format="gguf", out=tmp_path / "x.gguf")
        possible = "full precision" not in advice
        if possible:
            export(source, format="f16", out=tmp_path / "f16")
        else:
            with pytest.raises(UsageError, match="cannot be written"):
                export(source, format="f16", out=tmp_path / "f16")


def test_linears_of_one_kernel_need_one_scheme(tmp_path: Path) -> None:
    model, recipe = tiny_model("llama", torch.bfloat16), {"method": "rtn", "bits": 4, "group_size": 32}
    overrides = (("*.k_proj", ptq.Scheme(8, True, 32)),)
    ptq.quantize(model, out=tmp_path / "out", container="native", overrides=overrides, device="cpu", **recipe)
    with pytest.raises(UsageError, match=r"q_proj \(int4 sym g32\) and .*k_proj \(int8 sym g32\) are one kernel"):
        export(tmp_path / "out", format="gptq", out=tmp_path / "gptq")


def test_which_linears_are_one_kernel_is_no_matter_of_names(tmp_path: Path) -> None:
    """Phi's MLP has no gate, and q, k and v are joined by what they read; o alone may differ."""
    model, recipe = tiny_model("phi", torch.bfloat16), {"method": "rtn", "bits": 4, "group_size": 32}
    other = ptq.Scheme(8, True, 32)
    ptq.quantize(model, out=tmp_path / "a", container="native", overrides=(("*.fc2", other),), device="cpu", **recipe)
    export(tmp_path / "a", format="gptq", out=tmp_path / "gptq")
    ptq.quantize(
        model, out=tmp_path / "b", container="native", ignore=("*.1.self_attn.v_proj",), device="cpu", **recipe
    )
    with pytest.raises(UsageError, match=r"1\.self_attn\.q_proj \(int4 sym g32\) and .*v_proj \(full precision\)"):
        export(tmp_path / "b", format="gptq", out=tmp_path / "x")


def test_targets_in_use_are_refused(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out")
    with pytest.raises(OutputError, match="is the result itself"):
        export(source, format="bf16", out=source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and was not written by ptq"):
        export(source, format="bf16", out=tmp_path / "mine", overwrite=True)
    export(source, format="bf16", out=tmp_path / "bf16")
    with pytest.raises(OutputError, match="--overwrite"):
        export(source, format="gptq", out=tmp_path / "bf16")
    export(source, format="gptq", out=tmp_path / "bf16", overwrite=True)
    assert Report.load(tmp_path / "bf16").container == "gptq"
    with CheckpointWriter(tmp_path / "locked"), pytest.raises(OutputError, match="another run is writing"):
        export(source, format="bf16", out=tmp_path / "locked")


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out")
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OutputError, match="was changed after it was written"):
        export(source, format="bf16", out=tmp_path / "bf16")
    assert not (tmp_path / "bf16").exists()
    with pytest.raises(OutputError, match=r"has no ptq_report\.json"):
        export(tmp_path, format="bf16", out=tmp_path / "bf16")


def test_a_dequantized_folder_is_no_result(tmp_path: Path) -> None:
    source = quantized(tmp_path / "out")
    export(source, format="bf16", out=tmp_path / "bf16")
    with pytest.raises(UsageError, match="nothing is quantized any more"):
        export(tmp_path / "bf16", format="gptq", out=tmp_path / "gptq")


def test_one_weight_file_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = quantized(tmp_path / "out"), []
    written: list[str] = []
    monkeypatch.setattr("ptq.export.result.load_file", lambda path: (read.append(path.name), load_file(path))[1])
    write = CheckpointWriter.write_part

    def note(self: CheckpointWriter, name: str, *rest: Any) -> Path:
        written.append(name)
        assert len(read) == len(written)
        return write(self, name, *rest)

    monkeypatch.setattr(CheckpointWriter, "write_part", note)
    export(source, format="bf16", out=tmp_path / "bf16")
    assert len(written) == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path / "out")
    assert main(["export", str(source), "--format", "gptq", "-o", str(tmp_path / "gptq")]) == 0
    assert f"written to {tmp_path / 'gptq'}" in capsys.readouterr().out
    assert main(["export", str(source), "--format", "bf16", "-o", str(tmp_path / "bf16"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["container"] == "bf16"
    assert main(["export", str(source), "--format", "exl3", "-o", str(tmp_path / "x")]) == 2
    assert "gptq" in capsys.readouterr().err
    assert set(EXPORT_FORMATS) >= {"bf16", "gptq", "native", "compressed-tensors"}


def test_folded_shifts_are_taken_out_of_dense_weights() -> None:
    """What is multiplied with inputs as they are is the weight before the powers of two went into it."""
    scheme = Scheme.of("e2m1", scale_dtype="float16")
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    params = scheme.number_format.fit(weight, scheme)
    grid = scheme.number_format.grid(params, scheme, 32)
    shift = (torch.arange(32) % 4).to(torch.uint8)
    stored = {"input_scale": torch.ones(1), "input_shift": shift}
    codes = grid.round(weight)
    for name, factor in (("e2m1-folded", torch.pow(2.0, shift.float())), ("e2m1-shifted", torch.ones(32))):
        own = dataclasses.replace(scheme, act_format=name)
        quantized = QuantizedWeight(codes, params, own, stored)
        assert torch.equal(dense_weight(quantized), quantized.dequantize() * factor)

"""MODEL may be quantized already: the result is that of its dequantized weights, and it is said where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from ptq.report import Report
from tests.support.packed_checkpoints import CASES, change, write

TEXT = "Once upon a time there was a model that had more bits than it needed. " * 30


def folders(tmp_path: Path, case: str, tokenizer: Any) -> tuple[Path, Path]:
    """The packed folder and one with its dequantized weights."""
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    config, _, make = CASES[case]
    weights = write(packed, config, make, torch.bfloat16)
    dense.mkdir()
    plain = json.loads((packed / "config.json").read_text())
    del plain["quantization_config"]
    (dense / "config.json").write_text(json.dumps(plain))
    tensors = load_file(packed / "model.safetensors")
    prefixes = tuple(f"{name.removesuffix('.weight')}." for name in weights)
    kept = {name: value.clone() for name, value in tensors.items() if not name.startswith(prefixes)}
    rounded = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(kept | rounded, dense / "model.safetensors", metadata={"format": "pt"})
    for folder in (packed, dense):
        tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return packed, dense


def tensors_of(folder: Path) -> dict[str, Any]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", ["gptq-4", "awq", "fp8-block", "ct-4-asym"])
def test_the_result_is_that_of_the_dequantized_model(
    case: str, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, dense = folders(tmp_path, case, tiny_tokenizer)
    (packed / "quantize_config.json").write_text("{}")
    shared = ["--method", "gptq", "--bits", "3", "--group-size", "32", "--calib", str(tmp_path / "text.txt")]
    shared += ["--calib-samples", "2", "--calib-seqlen", "32", "--ignore", "*.up_proj"]
    for folder in (packed, dense):
        assert main(["quantize", str(folder), "-o", str(tmp_path / f"out-{folder.name}"), *shared]) == 0
    said = capsys.readouterr().err
    assert said.count("the model is quantized already") == 1
    assert "dequantized to bfloat16 block by block" in said
    first, second = (tensors_of(tmp_path / f"out-{name}") for name in ("packed", "dense"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    report = Report.load(tmp_path / "out-packed")
    method, bits, _ = CASES[case][0]["quant_method"], *CASES[case][1:]
    assert report.model["quantization"] == {"method": method, "bits": bits, "weights": 3, "dtype": "bfloat16"}
    assert "quantization" not in Report.load(tmp_path / "out-dense").model
    config = json.loads((tmp_path / "out-packed" / "config.json").read_text())
    assert config == json.loads((tmp_path / "out-dense" / "config.json").read_text())
    assert not (tmp_path / "out-packed" / "quantize_config.json").exists()


@pytest.mark.parametrize("case", ["gptq-3", "awq", "fp8-block", "fp8-tensor"])
def test_evaluating_it_is_evaluating_the_dequantized_model(
    case: str, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    for folder in folders(tmp_path, case, tiny_tokenizer):
        arguments = ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--seqlen", "32", "--max-tokens", "128"]
        assert main([*arguments, "--json"]) == 0
        records.append(json.loads(capsys.readouterr().out))
    nll = [[text["mean_nll"] for text in record["texts"]] for record in records]
    assert nll[0] == nll[1]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_what_cannot_be_read_is_one_sentence(
    command: str,
    config: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed, _ = folders(tmp_path, "awq", tiny_tokenizer)
    stored = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(stored | {"quantization_config": config}))
    arguments = {"quantize": ["--method", "rtn", "--bits", "4", "-o", str(tmp_path / "out")]}
    arguments["eval"] = ["--text", str(tmp_path / "text.txt"), "--seqlen", "32"]
    assert main([command, str(packed), *arguments[command], "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "ModelError"
    assert sentence.lower() in error["message"].lower()
    assert "\n" not in error["message"]


def test_an_output_in_the_native_format_is_not_quantized_again(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", "--method", "rtn", "--bits", "4", "--asym"]
    assert main([*arguments, str(tiny_folder), "-o", str(tmp_path / "out")]) == 0
    assert main([*arguments, str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 3
    assert f"give the model that it was made from (ptq report {tmp_path / 'out'} names it)" in capsys.readouterr().err


def test_the_models_own_text_from_a_packed_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    packed, _ = folders(tmp_path, "awq", tiny_tokenizer)
    arguments = ["--calib", "self", "--calib-samples", "2", "--calib-seqlen", "16", "-o", str(tmp_path / "out")]
    assert main(["quantize", str(packed), "--method", "gptq", "--bits", "4", "--group-size", "32", *arguments]) == 0


def test_a_scale_without_its_weight_is_named_and_left_out(
    tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, _ = folders(tmp_path, "fp8-tensor", tiny_tokenizer)
    change(packed, "model.layers.0.self_attn.k_proj.input_scale", torch.tensor(0.5))
    arguments = ["--method", "rtn", "--bits", "4", "--group-size", "32", "-o", str(tmp_path / "out")]
    assert main(["quantize", str(packed), *arguments]) == 0
    assert "no part of the model, left out: model.layers.0.self_attn.k_proj.input_scale" in capsys.readouterr().err

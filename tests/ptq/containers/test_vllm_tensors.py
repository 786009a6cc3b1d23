"""Rotated inputs and zero points in compressed-tensors: the library and stock transformers give our logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import ptq
from ptq.containers.native import GUARD_KEY
from ptq.containers.vllm_tensors import VLLM_TENSORS, stored_rotations
from ptq.errors import OutputError, UsageError
from ptq.export import export
from ptq.scheme import Rotation, Scheme
from tests.support.stock import stock_transformers
from tests.support.tiny_models import tiny_model

TOKENS = torch.arange(5, 37).reshape(2, 16)


def quantized(folder: Path, family: str = "llama", **fields: Any) -> Path:
    arguments: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu", **fields}
    ptq.quantize(tiny_model(family, torch.bfloat16), out=folder, container="compressed-tensors", **arguments)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found.float()


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.fixture
def stock() -> Iterator[None]:
    """transformers as it is without us."""
    with stock_transformers():
        yield


CASES: dict[str, dict[str, Any]] = {
    "residual, down": {"rotate": ["residual", "down"]},
    "input": {"rotate": ["input"]},
    "input in smaller blocks": {"rotate": ["input"], "rotate_block": 32},
    "floats": {"rotate": ["input"], "preset": "NVFP4A16", "bits": None, "group_size": None},
}


@pytest.mark.parametrize("case", CASES)
def test_the_librarys_transforms_on_the_stock_model_give_our_logits(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fields = {key: value for key, value in CASES[case].items() if value is not None}
    arguments = {"method": "rtn", "device": "cpu", "container": "compressed-tensors", **fields}
    if "preset" not in fields:
        arguments |= {"bits": 4, "group_size": 32}
    out = tmp_path / "out"
    report = ptq.quantize(tiny_model("llama", torch.bfloat16), out=out, **arguments)
    assert report.container == VLLM_TENSORS.name
    wanted = logits(ptq.load(out))
    request.getfixturevalue("stock")
    with pytest.raises(ValueError, match="rotated at run time"):  # and not another model without a word
        AutoModelForCausalLM.from_pretrained(out)
    config = config_of(out)
    bare = shutil.copytree(out, tmp_path / "bare")
    (bare / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != GUARD_KEY}))
    model = AutoModelForCausalLM.from_pretrained(bare)
    transforms = TransformConfig.model_validate(config["quantization_config"]["transform_config"])
    without = logits(model)
    apply_transform_config(model, transforms)
    close = 0.05 * float(wanted.std())  # in bfloat16, and packed weights are multiplied in another order
    assert float((logits(model) - wanted).abs().max()) < close
    assert float((without - wanted).abs().max()) > close


def test_a_model_that_is_saved_again_keeps_its_transforms(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out", rotate=["down"])
    model = ptq.load(out)
    model.save_pretrained(tmp_path / "again")
    first, second = (config_of(folder)["quantization_config"] for folder in (out, tmp_path / "again"))
    assert second["transform_config"] == first["transform_config"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_dequantized_loading_and_dense_exports_know_of_the_transforms(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out", rotate=["residual", "input"])
    wanted = logits(ptq.load(out))
    close = 0.05 * float(wanted.std())
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert float((logits(dense) - wanted).abs().max()) < close
    export(out, format="bf16", out=tmp_path / "bf16")
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")) - wanted).abs().max()) < close
    export(out, format="native", out=tmp_path / "native")
    assert torch.equal(logits(ptq.load(tmp_path / "native")), wanted)
    export(tmp_path / "native", format="compressed-tensors", out=tmp_path / "back")
    assert config_of(tmp_path / "back")["quantization_config"] == config_of(out)["quantization_config"]


def test_what_vllm_would_not_rotate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has a bias, and vLLM adds none.*What can: native"):
        quantized(tmp_path / "bias", "qwen2", rotate=["input"])
    with pytest.raises(UsageError, match=r"expert .* only ptq does"):
        quantized(tmp_path / "experts", "qwen3_moe", rotate=["input"])
    ptq.quantize(
        tiny_model("llama", torch.bfloat16), out=tmp_path / "signs", method="rtn", bits=4, group_size=32,
        rotate=["down"], device="cpu",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"random signs.*quantize again with --container compressed-tensors"):
        export(tmp_path / "signs", format="compressed-tensors", out=tmp_path / "stock")
    linear = nn.Linear(96 + 8, 8, bias=False)
    scheme = Scheme(4, input_rotation=Rotation(0, 32, "hadamard-unsigned"))
    reason = VLLM_TENSORS.unsupported_reason({"x": scheme}, {"x": linear}, nn.Module(), None)
    assert reason is not None
    assert "104 inputs of x are rotated in blocks of 32, 8" in reason


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_zero_points_load_dequantized_and_fail_aloud_otherwise(
    bits: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = quantized(tmp_path / "out", bits=bits, symmetric=False)
    assert GUARD_KEY not in config_of(out)
    wanted = logits(ptq.load(out))
    request.getfixturevalue("stock")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert float((logits(dense) - wanted).abs().max()) < 0.05 * float(wanted.std())


def test_zero_points_are_not_chosen_unasked_and_refused_where_no_reader_takes_them(tmp_path: Path) -> None:
    report = ptq.quantize(
        tiny_model("llama", torch.bfloat16), out=tmp_path / "auto", method="rtn", bits=4, group_size=32,
        symmetric=False, device="cpu",
    )  # fmt: skip
    assert report.container == "native"
    export(tmp_path / "auto", format="compressed-tensors", out=tmp_path / "stock")
    assert torch.equal(logits(ptq.load(tmp_path / "stock")), logits(ptq.load(tmp_path / "auto")))
    with pytest.raises(UsageError, match=r"zero points of 3 bits.*of 4 and 8.*--sym.*What can: native, gptq"):
        quantized(tmp_path / "three", bits=3, symmetric=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("type", "random-hadamard", "applies random-hadamard to input"),
        ("head_dim", 48, "in blocks of 48"),
        ("speed", 3, "does not accept the transform_config"),
    ],
)
def test_transforms_that_ptq_does_not_compute_are_refused(field: str, value: Any, message: str) -> None:
    group = {"type": "hadamard", "head_dim": 32, "apply": [{"targets": ["x"], "location": "input"}], field: value}
    model = nn.ModuleDict({"x": nn.Linear(192, 4)})
    with pytest.raises(OutputError, match=message):
        stored_rotations({"config_groups": {"R4": group}}, model)

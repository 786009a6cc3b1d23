"""Multimodal checkpoints: quantized in their language part, written whole, loaded as the class in their config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ptq
from calib.checkpoint.reader import open_model
from calib.model.model_class import language_model
from calib.model.structure import find_blocks
from ptq.errors import ModelError
from ptq.pipeline.events import Event
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_multimodal import MULTIMODAL, tiny_multimodal

OPTIONS = {"method": "rtn", "bits": 4, "group_size": 32}
TEXT = torch.tensor([[3, 4, 9, 30, 31]])
BROKEN = ("llama4",)  # transformers 5.24 fails at the end of this class's own forward
STOCK = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder + "/out").architectures[0]
    model, info = getattr(transformers, name).from_pretrained(folder + "/out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        torch.save([model.eval()(**one).logits for one in torch.load(folder + "/inputs")], folder + "/result")
assert "ptq" not in sys.modules
"""


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(**one).logits for one in inputs]


def put_dequantized(packed: torch.nn.Module, plain: torch.nn.Module) -> int:
    """Give a full-precision model the values of the packed linears of another one; how many there are."""
    found = {name: part for name, part in packed.named_modules() if isinstance(part, QuantLinear)}
    for name, linear in found.items():
        weight = plain.get_submodule(name).weight
        weight.data = linear.dequantize(weight.dtype)
    return len(found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_written_whole_with_equal_logits(family: str, symmetric: bool, tmp_path: Path, tiny_tokenizer: Any) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    plain, image = tiny_multimodal(family, source, tiny_tokenizer)
    report = ptq.quantize(source, out=out, symmetric=symmetric, **OPTIONS)
    before, after = stored(source), stored(out)
    packed = sum(name.endswith(".weight_packed") for name in after)
    kept = {name for name in before if name in after and after[name].dtype == before[name].dtype}
    assert len(before) - len(kept) == packed == len(report.layers)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in kept)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(plain).__name__]
    blocks = tuple(find_blocks(plain))
    assert all(layer.name.startswith(blocks) for layer in report.layers)
    model = ptq.load(out)
    assert type(model) is type(plain)
    assert put_dequantized(model, plain) == packed
    if family in BROKEN:
        (text,) = logits(language_model(model), [{"input_ids": TEXT}])
        assert torch.equal(text, logits(language_model(plain), [{"input_ids": TEXT}])[0])
        return
    inputs = [{"input_ids": TEXT}, image]
    expected = logits(plain, inputs)
    assert all(torch.equal(a, b) for a, b in zip(logits(model, inputs), expected, strict=True))


def test_stock_transformers_loads_it(tmp_path: Path, tiny_tokenizer: Any) -> None:
    expected = {}
    for family in ("gemma3", "qwen2_vl", "llava"):
        folder = tmp_path / family
        plain, image = tiny_multimodal(family, folder / "model", tiny_tokenizer)
        report = ptq.quantize(folder / "model", out=folder / "out", **OPTIONS)
        assert report.container == "compressed-tensors"
        put_dequantized(ptq.load(folder / "out"), plain)
        inputs = [{"input_ids": TEXT}, image]
        torch.save(inputs, folder / "inputs")
        expected[folder] = logits(plain, inputs)
    command = [sys.executable, "-c", STOCK, *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, wanted in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(torch.load(folder / "result"), wanted, strict=True)), folder


def test_calibration_runs_on_text_without_the_vision_tower(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_multimodal("llava", tmp_path / "model", tiny_tokenizer)
    calibration = {"calib": "pydoc", "calib_samples": 8, "calib_seqlen": 16}
    report = ptq.quantize(tmp_path / "model", out=tmp_path / "out", **OPTIONS | calibration | {"method": "gptq"})
    assert all(layer.loss is not None and layer.loss < 0.1 for layer in report.layers)


def test_tensors_that_transformers_does_not_know_go_along(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tiny_multimodal("qwen3_5", source, tiny_tokenizer)
    more = {"mtp.layers.0.down_proj.weight": torch.randn(8, 8), "mtp.norm.weight": torch.ones(8)}
    save_file(stored(source) | more, source / "model.safetensors", metadata={"format": "pt"})
    report = ptq.quantize(source, out=out, **OPTIONS)
    assert all(torch.equal(stored(out)[name], value) for name, value in more.items())
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"mtp.layers.0.down_proj", "model.visual.blocks.0.attn.qkv", "lm_head"} <= set(ignored)
    assert "mtp.norm.weight" in {tensor.name for tensor in report.kept}
    forecast = ptq.forecast(source, out=tmp_path / "other", **OPTIONS)
    assert forecast.kept_bytes == report.totals["kept_bytes"]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "llava", "mistral3", "llama4"])
def test_the_text_part_alone(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    plain, _ = tiny_multimodal(family, source, tiny_tokenizer)
    ptq.quantize(source, out=out, text_only=True, **OPTIONS)
    config = json.loads((out / "config.json").read_text())
    assert "vision_config" not in config
    model = ptq.load(out)
    assert [type(model).__name__] == config["architectures"]
    assert issubclass(type(model), transformers.PreTrainedModel)
    decoder = language_model(plain)
    inside = model if type(model) is type(decoder) else model.base_model
    assert put_dequantized(inside, decoder) == sum(name.endswith("_packed") for name in stored(out))
    reference = decoder if family in BROKEN else plain
    inputs = [{"input_ids": TEXT}]
    assert torch.equal(logits(model, inputs)[0], logits(reference, inputs)[0])
    head = json.loads((out / "ptq_report.json").read_text())["model"]["architecture"]
    assert head == config["architectures"][0]


def test_a_text_part_of_which_transformers_has_no_class(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_multimodal("qwen2_vl", tmp_path, tiny_tokenizer)
    with pytest.raises(ModelError, match=r"no causal language model for Qwen2VLTextConfig.*leave out --text-only"):
        open_model(tmp_path, text_only=True)


def test_text_only_of_a_text_model_is_said_to_have_no_effect(tiny_folder: Path, tmp_path: Path) -> None:
    said: list[Event] = []
    ptq.quantize(tiny_folder, out=tmp_path, text_only=True, on_event=said.append, **OPTIONS)
    assert any("--text-only has no effect" in event.text for event in said)


def test_a_checkpoint_without_its_vision_tower(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = tmp_path / "model"
    tiny_multimodal("qwen3_5", source, tiny_tokenizer)
    text = {name: value for name, value in stored(source).items() if ".visual." not in name}
    save_file(text, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*--text-only writes it alone"):
        open_model(source)
    ptq.quantize(source, out=tmp_path / "out", text_only=True, **OPTIONS)
    assert type(ptq.load(tmp_path / "out")).__name__ == "Qwen3_5ForCausalLM"


def test_a_rotation_into_which_images_do_not_follow_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_multimodal("llava", tmp_path / "model", tiny_tokenizer)
    rotated = OPTIONS | {"rotate": ("residual",)}
    with pytest.raises(ModelError, match=r"reads more than text.*--text-only"):
        ptq.quantize(tmp_path / "model", out=tmp_path / "out", **rotated)
    report = ptq.quantize(tmp_path / "model", out=tmp_path / "out", text_only=True, **rotated)
    assert report.model["architecture"] == "LlamaForCausalLM"


def test_keys_and_values_of_the_language_part_only(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_multimodal("llava", tmp_path / "model", tiny_tokenizer)
    ptq.quantize(tmp_path / "model", out=tmp_path / "out", kv_bits=8, **OPTIONS)
    model = ptq.load(tmp_path / "out")
    marked = [name for name, part in model.named_modules() if hasattr(part, "_ptq_kv")]
    assert marked
    assert all(name.startswith(tuple(find_blocks(model))) for name in marked)

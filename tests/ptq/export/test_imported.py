"""Folders of other programs as the start of an export: pairs of formats, files that are cut otherwise, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ptq
from calib.checkpoint.reader import open_model
from ptq.errors import UsageError
from ptq.export import export
from ptq.report import Report
from tests.support.tiny_models import tiny_model

NAME = "model.layers.0.mlp.down_proj"


def foreign(folder: Path, **fields: Any) -> Path:
    """A folder of ours without a trace of us."""
    arguments: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu", **fields}
    ptq.quantize(tiny_model("llama", torch.bfloat16), out=folder, **arguments)
    (folder / "ptq_report.json").unlink()
    (folder / "README.md").write_text("---\nbase_model: owner/base\nlicense: mit\n---\n")
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def dense(folder: Path) -> dict[str, Tensor]:
    source = open_model(folder)
    source.load(source.tensor_names())
    return {key: value.clone() for key, value in source.skeleton.state_dict().items()}


PAIRS = [
    ({"container": "awq", "symmetric": False}, "gptq"),
    ({"container": "awq"}, "compressed-tensors"),
    ({"container": "gptq"}, "awq"),
    ({"container": "gptq", "symmetric": False, "bits": 2}, "gptq"),
    ({"container": "compressed-tensors", "bits": 3}, "gptq"),
    ({"format": "nvfp4", "group_size": 16, "container": "compressed-tensors"}, "compressed-tensors"),
    ({"format": "fp8", "act_format": "fp8", "bits": 8, "group_size": None}, "compressed-tensors"),
]


@pytest.mark.parametrize(("fields", "target"), PAIRS)
def test_the_weights_are_the_same_in_another_format(fields: dict[str, Any], target: str, tmp_path: Path) -> None:
    source = foreign(tmp_path / "foreign", **fields)
    report = export(source, format=target, out=tmp_path / "out")
    assert report.container.removesuffix("_v2") == target
    assert report.recipe["method"] == "imported"
    found, wanted = dense(tmp_path / "out"), dense(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert "base_model: owner/base" in (tmp_path / "out" / "README.md").read_text()
    assert Report.load(tmp_path / "out") == report


def test_weights_of_one_linear_may_lie_in_two_files(tmp_path: Path) -> None:
    source = foreign(tmp_path / "foreign", container="gptq")
    tensors, whole = stored(source), shutil.copytree(source, tmp_path / "whole")
    for path in source.glob("model*"):
        path.unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    export(source, format="awq", out=tmp_path / "a")
    export(whole, format="awq", out=tmp_path / "b")
    found, wanted = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def change(folder: Path, name: str, tensor: Tensor) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: tensor}, path, {"format": "pt"})


def test_groups_in_another_order_go_into_dequantized_formats_only(tmp_path: Path) -> None:
    source = foreign(tmp_path / "foreign", container="gptq")
    key = f"{NAME}.g_idx"
    change(source, key, stored(source)[key].flip(0).contiguous())
    with pytest.raises(UsageError, match=r"down_proj has its groups in another order .*bf16, f16 and f32"):
        export(source, format="awq", out=tmp_path / "awq")
    export(source, format="bf16", out=tmp_path / "bf16")
    assert torch.equal(stored(tmp_path / "bf16")[f"{NAME}.weight"], dense(source)[f"{NAME}.weight"])


def test_zero_points_that_gptqmodel_took_from_whole_words(tmp_path: Path) -> None:
    source = foreign(tmp_path / "foreign", container="gptq", symmetric=False)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    (source / "config.json").write_text(json.dumps(config))
    key = f"{NAME}.qzeros"
    change(source, key, torch.full_like(stored(source)[key], -0x11111111))  # zero points 0, with borrows
    export(source, format="awq", out=tmp_path / "awq")
    assert torch.equal(dense(tmp_path / "awq")[f"{NAME}.weight"], dense(source)[f"{NAME}.weight"])


def test_what_has_no_codes_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_model("llama", torch.bfloat16).save_pretrained(plain)
    with pytest.raises(UsageError, match="is not quantized: ptq quantize"):
        export(plain, format="awq", out=tmp_path / "x")
    source = foreign(tmp_path / "foreign")
    change(source, f"{NAME}.weight_scale", stored(source)[f"{NAME}.weight_scale"].float())
    with pytest.raises(UsageError, match=r"down_proj\.weight_scale is F32.*bf16, f16 and f32"):
        export(source, format="gptq", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_gguf_file_becomes_a_dequantized_folder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    fields: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "scale_dtype": "float16", "device": "cpu"}
    model = tiny_model("llama", torch.bfloat16)
    ptq.quantize(model, out=tmp_path / "out", tokenizer=tiny_tokenizer, container="native", **fields)
    export(tmp_path / "out", format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    with pytest.raises(UsageError, match="exported to bf16, f16, f32 only"):
        export(tmp_path / "m.gguf", format="gptq", out=tmp_path / "gptq")
    export(tmp_path / "m.gguf", format="bf16", out=tmp_path / "bf16")
    export(tmp_path / "out", format="bf16", out=tmp_path / "direct")
    found, wanted = stored(tmp_path / "bf16"), stored(tmp_path / "direct")
    assert torch.equal(found[f"{NAME}.weight"], wanted[f"{NAME}.weight"])
    assert {path.name for path in (tmp_path / "bf16").iterdir()} >= {"tokenizer.json", "README.md", "config.json"}

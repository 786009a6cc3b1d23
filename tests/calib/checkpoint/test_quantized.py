"""Checkpoints that are quantized already: every layout against a slow formula of its own, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.checkpoint.reader import open_model
from calib.errors import ModelError
from tests.support.packed_checkpoints import (
    AWQ,
    BLOCKS,
    CASES,
    GPTQ,
    GROUP,
    UP,
    Packed,
    awq,
    change,
    change_config,
    ct,
    gptq,
    group,
    scales_of,
    write,
)
from tests.support.tiny_models import tiny_model


def loaded(folder: Path) -> Any:
    source = open_model(folder)
    source.load(source.tensor_names())
    return source


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_slow_formula(case: str, tmp_path: Path) -> None:
    config, bits, make = CASES[case]
    dense = write(tmp_path, config, make)
    source = open_model(tmp_path)
    assert source.quantization is not None
    assert source.quantization.to_dict() == {
        "method": config["quant_method"],
        "bits": bits,
        "weights": 3,
        "dtype": "float32",
    }
    assert getattr(source.skeleton.config, "quantization_config", None) is None
    assert source.unused() == []
    source.load(source.tensor_names())
    for name, weight in dense.items():
        torch.testing.assert_close(source.skeleton.get_parameter(name).data, weight, rtol=1e-6, atol=1e-9)
    raw = {key: tensor for key, _, tensor in source.raw_tensors(frozenset(dense))}
    assert raw.keys() == dense.keys()
    assert all(torch.equal(raw[name], source.skeleton.get_parameter(name)) for name in dense)
    sizes = {name: (shape, size) for name, shape, size in source.stored_sizes(frozenset(dense))}
    assert sizes == {name: (tuple(weight.shape), 4 * weight.numel()) for name, weight in dense.items()}


@pytest.mark.parametrize(
    ("stated", "plain", "wanted"),
    [("float16", torch.bfloat16, torch.float16), (None, torch.bfloat16, torch.bfloat16), (None, torch.float16, None)],
)
def test_the_dtype_is_the_configs_or_that_of_what_is_not_quantized(
    stated: str | None, plain: torch.dtype, wanted: torch.dtype | None, tmp_path: Path
) -> None:
    dense = write(tmp_path, AWQ, awq, plain)
    change_config(tmp_path, dtype=stated)
    source = open_model(tmp_path)
    source.load(source.tensor_names())
    name = f"{UP}.weight"
    assert source.dtype == (wanted or plain)
    assert torch.equal(source.skeleton.get_parameter(name), dense[name].to(wanted or plain))  # rounded once


def test_zero_points_that_gptqmodel_wrapped_by_words(tmp_path: Path) -> None:
    """GPTQModel takes one off every code of a word at once, with a borrow where a code is 0; it says who it is."""

    def by_words(out: int, width: int, seed: int) -> Packed:
        packed = gptq(out, width, seed, 4, off=0)
        v1 = packed.tensors["qzeros"].long() - 0x11111111
        return Packed(packed.tensors | {"qzeros": ((v1 + 2**31) % 2**32 - 2**31).to(torch.int32)}, packed.dense)

    dense = write(tmp_path, GPTQ | {"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}, by_words)
    source = open_model(tmp_path)
    source.load(source.tensor_names())
    for name, weight in dense.items():
        torch.testing.assert_close(source.skeleton.get_parameter(name).data, weight, rtol=1e-6, atol=1e-9)


def test_gptq_without_an_index_and_with_its_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    def make(out: int, width: int, seed: int) -> Packed:
        packed = gptq(out, width, seed, 4)
        return Packed({role: t for role, t in packed.tensors.items() if role != "g_idx"}, packed.dense)

    dense = write(tmp_path, {}, make)
    change_config(tmp_path, quantization_config=None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP, "desc_act": False}))
    source = open_model(tmp_path)
    source.load(source.tensor_names())
    torch.testing.assert_close(source.skeleton.get_parameter(f"{UP}.weight").data, dense[f"{UP}.weight"])


def test_gptq_of_transposed_linears(tmp_path: Path) -> None:
    """GPT-2 stores its weights ``[in, out]``; square ones must be turned as well."""
    tiny_model("gpt2", num_hidden_layers=1, n_layer=1).save_pretrained(tmp_path)
    tensors = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    name = "transformer.h.0.attn.c_proj"
    del tensors[f"{name}.weight"]
    packed = gptq(64, 64, 0, 4)
    tensors |= {f"{name}.{role}": tensor for role, tensor in packed.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config=GPTQ | {"bits": 4})
    source = open_model(tmp_path)
    source.load(source.tensor_names())
    torch.testing.assert_close(source.skeleton.get_parameter(f"{name}.weight").data, packed.dense.T)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_fp8(family: str, tmp_path: Path) -> None:
    """One tensor an expert in the file, dequantized and then merged and split as in full precision."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tensors = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    plain, dense = open_model(tmp_path), dict(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        scale = torch.rand(math.ceil(tensors[name].shape[0] / 32), math.ceil(tensors[name].shape[1] / 32)) * 0.01
        weight = (tensors.pop(name) / 0.01).to(torch.float8_e4m3fn)
        full = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
        dense[name] = weight.float() * full
        tensors |= {name: weight, f"{name}_scale_inv": scale}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    packed, dense_source = open_model(tmp_path), open_model(tmp_path / "dense")
    assert packed.tensor_names() == dense_source.tensor_names() == plain.tensor_names()
    for source in (packed, dense_source):
        source.load(source.tensor_names())
    wanted = dense_source.skeleton.state_dict()
    for name, value in packed.skeleton.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_nothing_is_dequantized_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calib.checkpoint.quantized import weights

    write(tmp_path, AWQ, awq)
    read = []
    monkeypatch.setattr(weights._PackedSlice, "__getitem__", lambda self, index: read.append(self) or torch.zeros(1))
    source = open_model(tmp_path)
    list(source.stored_sizes(source.tensor_names()))
    source.fingerprint()
    assert read == []


def test_the_fingerprint_follows_the_packed_weights(tmp_path: Path) -> None:
    write(tmp_path, AWQ, awq)
    before = open_model(tmp_path).fingerprint()
    change(tmp_path, f"{UP}.scales", scales_of((2, 96), 9).half())
    assert open_model(tmp_path).fingerprint() != before


BROKEN: list[tuple[str, str, Tensor | None, str]] = [
    ("gptq-4", "scales", None, r"up_proj.*scales is missing"),
    ("gptq-4", "qzeros", None, r"up_proj.*qzeros is missing"),
    ("gptq-4", "qzeros", torch.zeros(2, 11, dtype=torch.int32), r"qzeros has the shape \[2, 11\].*\[2, 12\]"),
    ("gptq-4", "qweight", torch.zeros(9, 96, dtype=torch.int32), r"qweight has the shape \[9, 96\].*\[8, 96\]"),
    ("gptq-4", "qweight", torch.zeros(8, dtype=torch.int32), r"not two sizes"),
    ("gptq-4", "g_idx", torch.full((64,), 7, dtype=torch.int32), r"g_idx names groups 7 to 7 of 2"),
    ("gptq-4", "weight", torch.zeros(96, 64), r"twice, dense and quantized"),
    ("awq", "scales", torch.zeros(2, 90).half(), r"scales has the shape.*AWQ"),
    ("awq", "qzeros", torch.zeros(1, 12, dtype=torch.int32), r"qzeros has the shape"),
    ("fp8-tensor", "weight_scale", None, r"up_proj\.weight is stored in FP8, but"),
    ("fp8-tensor", "weight_scale", torch.zeros(3), r"shape \[3\].*one per channel"),
    ("fp8-block", "weight_scale_inv", torch.zeros(2, 2), r"shape \[2, 2\].*\[3, 2\] for blocks of \[32, 40\]"),
    ("fp8-block", "weight", torch.zeros(96, 64), r"up_proj\.weight has a scale .*not as FP8"),
    ("ct-4-asym", "weight_zero_point", None, r"weight_zero_point is missing"),
    ("ct-4-sym", "weight_packed", torch.zeros(96, 9, dtype=torch.int32), r"weight_packed has the shape \[96, 9\]"),
    ("ct-4-sym", "weight_scale", torch.zeros(96, 3), r"weight_scale has the shape \[96, 3\].*\[96, 2\]"),
    ("ct-4-sym", "weight_shape", torch.tensor([96, 0]), r"not two sizes"),
    ("ct-4-sym", "weight_shape", torch.tensor([96, 32]), r"shape"),
    ("ct-4-sym", "weight_g_idx", torch.zeros(64, dtype=torch.int32), r"weight_g_idx"),
    ("ct-3-sym", "weight_packed", torch.zeros(96, 7, dtype=torch.int32), r"\[96, 7\].*\[96, 6\]"),
]


@pytest.mark.parametrize(("case", "role", "tensor", "message"), BROKEN)
def test_tensors_that_are_missing_or_do_not_fit_are_refused(
    case: str, role: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    config, _, make = CASES[case]
    write(tmp_path, config, make, linears=(UP,))
    change(tmp_path, f"{UP}.{role}", tensor)
    with pytest.raises(ModelError, match=message):
        loaded(tmp_path)


NOT_READ: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"quant_method": "bitsandbytes"}, r"already \(bitsandbytes\).*dequantize\(\)\.save_pretrained"),
    ("awq", {"load_in_4bit": True}, r"already \(bitsandbytes\)"),
    ("awq", {"quant_method": "hqq"}, r"already \(hqq\).*full-precision model"),
    ("awq", {"quant_method": "mxfp4"}, r"already \(mxfp4\).*Mxfp4Config\(dequantize=True\)"),
    ("awq", {"quant_method": "auto-round"}, r"already \(auto-round\).*full-precision model"),
    ("awq", {"quant_method": 7}, r"already \(7\)"),
    ("awq", {"bits": 4}, r"already \(None\)"),
    ("awq", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt NVFP4"),
    ("awq", {"quant_method": "ptq", "version": 2}, r"output of ptq in its native format.*ptq report"),
    ("awq", {"quant_method": "fp8"}, r"hold no such weights"),
    ("awq", AWQ | {"version": "gemv"}, r"layout 'gemv'"),
    ("awq", AWQ | {"group_size": 16}, r"2 groups for 64 channels.*16"),
    ("awq", AWQ | {"group_size": "x"}, r"group_size 'x'"),
    ("gptq-4", GPTQ | {"bits": 4, "format": "marlin"}, r"layout 'marlin'"),
    ("gptq-4", GPTQ | {"bits": 5}, r"5 bits.*2, 3, 4, 8"),
    ("gptq-4", GPTQ | {"bits": 8}, r"qweight has the shape"),
    ("gptq-4", GPTQ, r"None bits"),
    ("fp8-block", BLOCKS | {"weight_block_size": [128]}, r"not two sizes such as"),
    ("fp8-block", BLOCKS | {"weight_block_size": None}, r"one per channel"),
    ("ct-4-sym", ct("mxfp6-pack-quantized", group(4)), r"'mxfp6-pack-quantized'.*pack-quantized"),
    ("ct-4-sym", ct("nvfp4-pack-quantized", group(4)), r"nvfp4-pack-quantized with 4 bits and scales by group"),
    ("ct-4-sym", ct("pack-quantized", group(4, strategy="rows")), r"does not accept the quantization_config"),
    ("ct-4-sym", ct("pack-quantized", group(4, actorder="group")), r"does not accept"),
    (
        "ct-4-sym",
        ct("pack-quantized", group(4)) | {"transform_config": {"config_groups": {"R1": 1}}},
        r"transform_config",
    ),
    (
        "ct-4-sym",
        ct("pack-quantized", {"g": {"targets": ["re:.*q_proj"], "weights": group(4)["group_0"]["weights"]}}),
        r"no group of the quantization_config",
    ),
    ("ct-4-sym", ct("pack-quantized", group(4, strategy="tensor_group")), r"by 'tensor_group'"),
]


@pytest.mark.parametrize(("case", "config", "message"), NOT_READ)
def test_what_is_not_read_is_refused_by_name(case: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, config, CASES[case][2], linears=(UP,))
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path)

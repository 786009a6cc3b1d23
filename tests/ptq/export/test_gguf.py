"""Export to GGUF: the values that the gguf package reads, what transformers loads, families, tokenizers, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptq
from cli.main import main
from ptq.errors import OutputError, UsageError
from ptq.export import export
from ptq.export.gguf.metadata import rope_factors
from ptq.export.gguf.vocabulary import split_rule
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model


def quantized(folder: Path, model: Any, tokenizer: Any, **fields: Any) -> Path:
    arguments: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "scale_dtype": "float16"}
    arguments |= {"device": "cpu", "container": "native"}
    ptq.quantize(model, out=folder, tokenizer=tokenizer, **(arguments | fields))
    return folder


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by the gguf package's own decoder."""
    reader = gguf.GGUFReader(path)
    return {
        one.name: torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type))).float()
        for one in reader.tensors
    }


def types(path: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def test_int4_is_q4_0_with_the_same_values(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama", torch.bfloat16)
    source = quantized(tmp_path / "out", model, tiny_tokenizer)
    report = export(source, format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    assert report.container == "gguf"
    found, kinds, wanted = read(tmp_path / "m.gguf"), types(tmp_path / "m.gguf"), ptq.load(source)
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "BF16"
    block: Any = wanted.model.layers[0]
    assert torch.equal(found["blk.0.ffn_down.weight"], block.mlp.down_proj.dequantize())
    # of q and k, row 2 j of a head is its channel j, row 2 j + 1 its channel 8 + j
    q, stored = block.self_attn.q_proj.dequantize(), found["blk.0.attn_q.weight"]
    assert torch.equal(stored[0], q[0])
    assert torch.equal(stored[1], q[8])
    assert torch.equal(stored[18], q[17])
    assert torch.equal(found["output_norm.weight"], wanted.model.norm.weight.float())


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "int2": ({"bits": 2}, "Q4_0"),
    "int2 per channel": ({"bits": 2, "group_size": None}, "TQ2_0"),
    "int3": ({"bits": 3, "group_size": 64}, "Q4_0"),
    "int5": ({"bits": 5}, "Q5_0"),
    "int6": ({"bits": 6, "group_size": 64}, "Q8_0"),
    "int8": ({"bits": 8}, "Q8_0"),
    "q3_k": ({"format": "q3_k", "bits": 3, "group_size": 256}, "Q3_K"),
    "q2_k": ({"format": "q2_k", "bits": 2, "group_size": 256, "symmetric": False}, "Q2_K"),
    "mxfp4": ({"format": "mxfp4", "scale_dtype": "auto"}, "MXFP4"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_type_holds_the_values_exactly(case: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    fields, kind = FORMATS[case]
    model = tiny_model("qwen2", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    source = quantized(tmp_path / "out", model, tiny_tokenizer, **fields)
    export(source, format="gguf", out=tmp_path / "m.gguf")
    found, kinds = read(tmp_path / "m.gguf"), types(tmp_path / "m.gguf")
    block: Any = ptq.load(source).model.layers[0]
    for name, linear in (("ffn_up", block.mlp.up_proj), ("attn_q", block.self_attn.q_proj)):
        assert kinds[f"blk.0.{name}.weight"] == kind
        wanted = linear.dequantize()
        torch.testing.assert_close(found[f"blk.0.{name}.weight"], wanted, atol=1e-6, rtol=1e-6)
    assert kinds["token_embd.weight"] == "Q6_K"
    assert torch.equal(found["blk.0.attn_q.bias"], block.self_attn.q_proj.bias.float())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny_model(family, sliding_window=None) if family == "mistral" else tiny_model(family)
    source = quantized(tmp_path / "out", model, tiny_tokenizer)
    export(source, format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    wanted = ptq.load(source)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = wanted(tokens).logits.float()
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


NORMS = {"gemma2": 1.0, "gemma3_text": 1.0, "qwen3": 0.0}
"""What is added to the weights of norms, by family."""


@pytest.mark.parametrize("family", NORMS)
def test_other_families_are_written_as_llama_cpp_has_them(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    changes = {"sliding_window_pattern": 6} if family == "gemma3_text" else {}
    model = tiny_model(family, **changes)
    source = quantized(tmp_path / "out", model, tiny_tokenizer)
    export(source, format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    found, wanted = read(tmp_path / "m.gguf"), ptq.load(source)
    torch.testing.assert_close(found["output_norm.weight"], wanted.model.norm.weight.float() + NORMS[family])
    block: Any = wanted.model.layers[0]
    assert torch.equal(found["blk.0.attn_output.weight"], block.self_attn.o_proj.dequantize())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields[f"{fields['general.architecture'].contents()}.block_count"].contents() == 2


def test_metadata_and_tokenizer(tmp_path: Path, tiny_folder: Path) -> None:
    ptq.quantize(tiny_folder, method="rtn", bits=4, group_size=32, scale_dtype="float16", out=tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export(tmp_path / "out", format="gguf", out=tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(tokenizer)
    assert tokens[tokenizer.bos_token_id] == "<s>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    record = json.loads(fields["ptq.report"].contents())
    assert record["recipe"]["method"] == "rtn"


def test_rules_of_splitting_are_found() -> None:
    split = {
        "type": "Split",
        "pattern": {
            "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        },
    }
    steps = [split, {"type": "ByteLevel", "use_regex": False}]
    assert split_rule({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}) == "qwen2"
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]
    assert split_rule({"pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}) == "smollm"
    with pytest.raises(UsageError, match=r"does not know a llama\.cpp name"):
        split_rule({"pre_tokenizer": {"type": "Whitespace"}})


def test_frequencies_of_llama_3() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    found = rope_factors(model.config)
    assert found is not None
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / found, model.model.rotary_emb.inv_freq, rtol=1e-4, atol=0)


NVFP4: dict[str, Any] = {"format": "nvfp4", "group_size": 16, "scale_dtype": "auto"}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_one_tensor_of_each_kind(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = quantized(tmp_path / "out", tiny_model(family, **EXPERTS[family]), tiny_tokenizer)
    export(source, format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    found, kinds = read(tmp_path / "m.gguf"), types(tmp_path / "m.gguf")
    block: Any = ptq.load(source).model.layers[0].mlp
    for leaf in ("gate", "up", "down"):
        wanted = torch.stack([getattr(block.experts[i], f"{leaf}_proj").dequantize() for i in range(4)])
        assert kinds[f"blk.0.ffn_{leaf}_exps.weight"] == "Q4_0"
        assert torch.equal(found[f"blk.0.ffn_{leaf}_exps.weight"], wanted)
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    arch = fields["general.architecture"].contents()
    assert (fields[f"{arch}.expert_count"].contents(), fields[f"{arch}.expert_used_count"].contents()) == (4, 2)
    if family == "qwen2_moe":
        assert found["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)
        assert fields[f"{arch}.expert_shared_feed_forward_length"].contents() == 64


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nvfp4_has_its_tensor_scale_beside_it(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = tiny_model(family, intermediate_size=64)
    source = quantized(tmp_path / "out", model, tiny_tokenizer, **NVFP4)
    export(source, format="gguf", out=tmp_path / "m.gguf", embedding="keep")
    found, kinds = read(tmp_path / "m.gguf"), types(tmp_path / "m.gguf")
    mlp: Any = ptq.load(source).model.layers[0].mlp
    name, owners = (
        ("ffn_up", [mlp]) if family == "llama" else ("ffn_up_exps", [mlp.experts[number] for number in range(4)])
    )
    assert kinds[f"blk.0.{name}.weight"] == "NVFP4"
    scale = found[f"blk.0.{name}.scale"]
    assert scale.shape == (len(owners),)
    values = found[f"blk.0.{name}.weight"].view(len(owners), 64, 64) * scale[:, None, None]
    torch.testing.assert_close(values, torch.stack([one.up_proj.dequantize() for one in owners]), atol=0, rtol=3e-7)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero points": ("llama", {"symmetric": False}, r"_proj \(int4 asym g32.*zero points.*q4_k"),
    "groups": ("llama", {"group_size": 16}, "scales belong to 32 weights"),
    "rotated": ("llama", {"rotate": ("down",)}, "rotated at run time"),
    "format": ("llama", {"format": "fp4"}, "no type with the values of fp4"),
    "windows": ("gemma3_text", {}, r"every 6th block .* the blocks \[1\]"),
    "scales of tensors": ("qwen2", {**NVFP4, "ignore": ("*.down_proj",)}, "only in llama, mistral, mixtral, qwen3"),
    "blocks of nvfp4": ("llama", NVFP4, "64 x 96.*blocks there are 64 weights"),
    "weights of experts": ("qwen3_moe", {}, "norm_topk_prob=False"),
    "an expert": ("mixtral", {"ignore": ("*.experts.1.up_proj",)}, "all experts of a layer in one type"),
    "experts that differ": (
        "mixtral",
        {"overrides": (("*.experts.1.up_proj", Scheme(8, group_size=32, scale_dtype="float16")),)},
        "its experts would be Q4_0 and Q8_0",
    ),
    "family": ("olmo2", {}, "this is a olmo2 model.*convert_hf_to_gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused(case: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    family, fields, reason = REFUSED[case]
    source = quantized(tmp_path / "out", tiny_model(family), tiny_tokenizer, **fields)
    with pytest.raises(UsageError, match=reason):
        export(source, format="gguf", out=tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_targets_in_use_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = quantized(tmp_path / "out", tiny_model("llama"), tiny_tokenizer)
    with pytest.raises(OutputError, match="is a file: name it"):
        export(source, format="gguf", out=tmp_path / "m")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="is there"):
        export(source, format="gguf", out=tmp_path / "m.gguf")
    export(source, format="gguf", out=tmp_path / "m.gguf", overwrite=True)
    assert len(read(tmp_path / "m.gguf")) > 10
    shutil.rmtree(tmp_path / "out")
    assert main(["export", str(source), "--format", "gguf", "-o", str(tmp_path / "n.gguf")]) == 3


def test_a_file_is_made_directly(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.gguf"
    arguments = ["quantize", "--method", "rtn", "--bits", "4", "--group-size", "32", str(tiny_folder), "-o", str(file)]
    assert main(arguments) == 0
    assert types(file)["blk.1.ffn_up.weight"] == "Q4_0"
    assert (tmp_path / "m" / "ptq_report.json").is_file()
    assert main(arguments) == 6
    assert "--restart" in capsys.readouterr().err
    assert main([*arguments, "--restart"]) == 0
    assert main(["quantize", "--method", "rtn", "--asym", str(tiny_folder), "-o", str(tmp_path / "n.gguf")]) == 2
    assert not (tmp_path / "n").exists()

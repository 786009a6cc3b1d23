"""Opening models: what is read, what is refused and with which sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from calib.checkpoint.reader import open_model
from calib.errors import ModelError
from tests.support.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["one", "many"])
def test_loading_by_parts_gives_the_whole_model(family: str, shards: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10GB" if shards == "one" else "40KB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "many")
    source = open_model(tmp_path)
    assert source.dtype == torch.bfloat16
    assert all(p.device.type == "meta" for p in source.skeleton.parameters())
    source.load(source.tensor_names())
    wanted = model.state_dict()
    for name, value in source.skeleton.state_dict().items():
        if name in wanted:  # experts, which have other names here: test_experts.py
            assert torch.equal(value, wanted[name]), name
    assert source.skeleton.state_dict().keys() >= {name for name in wanted if ".experts." not in name}


def test_raw_tensors_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    source = open_model(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    raw = {key: tensor for key, _, tensor in source.raw_tensors(source.tensor_names())}
    assert raw.keys() == stored.keys()
    assert all(torch.equal(raw[name], stored[name]) for name in raw)


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    prints = set()
    for seed in (0, 0, 1):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path)
        prints.add(open_model(tmp_path).fingerprint())
    assert len(prints) == 2
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\x3f")  # the last number of the last tensor
    assert open_model(tmp_path).fingerprint() not in prints


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle.*save_pretrained"):
        open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        open_model("no such/folder/at all")
    with pytest.raises(ModelError, match="no file"):
        open_model(tmp_path / "absent.gguf")


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="t5"):
        open_model(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"not a causal"):
        open_model(torch.nn.Linear(2, 2))
    assert BertForMaskedLM(BertConfig(**tiny, vocab_size=32)) is not None


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = {k: v.clone() for k, v in load_file(file).items()}  # the file is mapped, and about to be cut
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors"):
        open_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of.*up_proj"):
        open_model(tmp_path)
    save_file({**whole, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.*\(3, 3\)"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", "absent.safetensors", 7])
def test_an_index_cannot_leave_the_folder(tmp_path: Path, name: object) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"index|lacks"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        open_model(tmp_path)


def test_a_tied_model_may_store_only_its_head(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)  # tied
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, file, metadata={"format": "pt"})
    source = open_model(tmp_path)
    assert source.tensor_names() == frozenset(tensors) | {"model.embed_tokens.weight"}
    assert source.unused() == []
    source.load(source.tensor_names())
    assert torch.equal(source.skeleton.get_input_embeddings().weight, embedding)
    assert source.skeleton.get_output_embeddings().weight is source.skeleton.get_input_embeddings().weight
    raw = {key: tensor for key, _, tensor in source.raw_tensors(frozenset({"model.embed_tokens.weight"}))}
    assert torch.equal(raw["model.embed_tokens.weight"], embedding)
    assert dict(source.skeleton.state_dict())["lm_head.weight"].shape == embedding.shape
    [(_, shape, size)] = source.stored_sizes(frozenset({"model.embed_tokens.weight"}))
    assert (shape, size) == (tuple(embedding.shape), embedding.nbytes)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of"):
        open_model(tmp_path)

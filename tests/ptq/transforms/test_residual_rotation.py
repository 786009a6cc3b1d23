"""The rotation of the residual stream: the same outputs, for every family that allows it, from whatever is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from calib.checkpoint.reader import ModelSource, open_model
from calib.precision import strict_float32
from calib.runner.runner import CalibrationRunner
from ptq.errors import ModelError
from ptq.transforms.rotation.online import StreamRotation
from ptq.transforms.rotation.residual import RotatedSource, rotate_residual
from tests.support.tiny_models import EXPERT_FAMILIES, FAMILIES, ODD_FAMILIES, tiny_model

POST_NORMS = ("gemma2", "gemma3_text", "olmo2")
ROTATED = (*(f for f in FAMILIES if f not in POST_NORMS), "hunyuan_v1_moe", "gpt_bigcode", "lfm2", "aria_text")


def tokens(sequences: int = 2, length: int = 20) -> Tensor:
    return torch.randint(0, 400, (sequences, length), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens(), use_cache=False).logits
    return logits


def change(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def rotated_model(model: nn.Module, seed: int = 0) -> RotatedSource:
    """All of a model in memory, rotated and loaded."""
    source = rotate_residual(open_model(model), seed)
    source.load(source.tensor_names())
    return source


def save_rotated(source: ModelSource, folder: Path) -> Path:
    """What the pipeline writes of tensors that are not quantized."""
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, _, tensor in source.raw_tensors(source.tensor_names())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert source.folder is not None
    config = json.loads((source.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **source.config_changes}))
    return folder


@pytest.mark.parametrize("family", ROTATED)
def test_outputs_stay(family: str) -> None:
    model = tiny_model(family)
    source = rotated_model(model)
    assert change(outputs(source.skeleton), outputs(model)) < 1e-4
    before = model.get_input_embeddings().weight
    after: Any = source.skeleton.get_input_embeddings()
    assert change(after.weight, before) > 0.5  # it was rotated at all


@pytest.mark.parametrize("family", POST_NORMS)
def test_a_norm_on_what_is_added_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.post_attention_layernorm is a norm on what its block adds"):
        rotate_residual(open_model(tiny_model(family)), 0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", r"layers\.1\.feed_forward\.experts\.gate_up_proj has 3 dimensions"),
        ("mamba", r"in backbone\.layers\.0 something else|something else .* in backbone\.layers\.0"),
        ("gemma3n_text", "cannot be run"),
        ("bloom", "between the embedding and the first block something else"),
        ("olmo", "lm_head does not read the output of a norm"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refusals_name_the_part(family: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family not in FAMILIES | ODD_FAMILIES | EXPERT_FAMILIES:
        monkeypatch.setitem(FAMILIES, family, {})
    with pytest.raises(ModelError, match=reason):
        rotate_residual(open_model(tiny_model(family)), 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "stablelm", "qwen3_moe", "deepseek_v3"])
def test_what_is_written_loads_in_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    source = rotate_residual(open_model(tmp_path / "model"), 0)
    saved = save_rotated(source, tmp_path / "rotated")
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert change(outputs(loaded), outputs(model)) < 1e-4


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_experts_are_written_one_by_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    source = rotate_residual(open_model(tmp_path / "model"), 0)
    raw = {name: tensor for _, name, tensor in source.raw_tensors(source.tensor_names())}
    source.load(source.tensor_names())
    loaded = dict(source.skeleton.named_parameters())
    assert raw.keys() == loaded.keys()
    for name, tensor in raw.items():
        torch.testing.assert_close(tensor, loaded[name].data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_block_by_block_is_the_same_as_all_at_once(family: str, tmp_path: Path) -> None:
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / "model")
    eager = rotate_residual(open_model(tmp_path / "model"), 0)
    eager.load(eager.tensor_names())
    whole = {name: value.detach() for name, value in eager.skeleton.named_parameters()}
    lazy = rotate_residual(open_model(tmp_path / "model"), 0)
    for name in sorted(lazy.tensor_names()):
        assert lazy.skeleton.get_parameter(name).is_meta
        lazy.load(frozenset({name}))
        assert lazy.skeleton.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(lazy.skeleton.get_parameter(name), whole[name]), name
        lazy.release(frozenset({name}))
        (raw,) = [tensor for _, _, tensor in lazy.raw_tensors(frozenset({name}))]
        assert torch.equal(raw, whole[name]), name


def test_sizes_are_those_of_what_is_written(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / family)
        source = rotate_residual(open_model(tmp_path / family), 0)
        told = {name: (shape, size) for name, shape, size in source.stored_sizes(source.tensor_names())}
        raw = source.raw_tensors(source.tensor_names())
        assert told == {name: (tuple(tensor.shape), tensor.nbytes) for _, name, tensor in raw}


def test_a_walk_meets_the_rotated_stream() -> None:
    model = tiny_model("llama")
    plain, rotated = open_model(model), rotate_residual(open_model(model), 3)
    streams = []
    with torch.no_grad(), strict_float32():
        for source in (plain, rotated):
            runner = CalibrationRunner(source, tokens(), device=torch.device("cpu"), dtype=torch.float32)
            streams.append([runner.hidden(0, full=True).clone() for _ in runner])
    for before, after in zip(*streams, strict=True):
        assert change(after, rotated.rotation(before)) < 1e-5


def test_a_tied_head_becomes_a_tensor_of_its_own(tiny_folder: Path) -> None:
    plain = open_model(tiny_folder)
    assert "lm_head.weight" not in plain.tensor_names()
    assert plain.config_changes == {}
    source = rotate_residual(plain, 0)
    assert source.tensor_names() == plain.tensor_names() | {"lm_head.weight"}
    assert source.config_changes == {"tie_word_embeddings": False}
    head = source.skeleton.get_parameter("lm_head.weight")
    assert source.notes == (
        f"the rotation gives the head a tensor of its own, lm_head.weight: {head.nbytes:,} bytes more "
        "(--rotate-head online keeps it tied)",
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "stablelm", "qwen3_moe"])
def test_an_online_rotation_keeps_the_tie_and_the_outputs(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    plain = open_model(model)
    source = rotate_residual(open_model(model), 0, keep_tie=True)
    assert source.tensor_names() == plain.tensor_names()
    assert source.config_changes == {}
    assert source.online is not None
    source.load(source.tensor_names())
    rotated: Any = source.skeleton
    assert rotated.get_output_embeddings().weight is rotated.get_input_embeddings().weight
    assert torch.equal(rotated.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert change(outputs(rotated), outputs(model)) < 1e-4
    rotated.get_input_embeddings()._forward_hooks.clear()
    assert change(outputs(rotated), outputs(model)) > 1e-2


def test_a_walk_meets_the_stream_rotated_online(tiny_folder: Path) -> None:
    plain, rotated = open_model(tiny_folder), rotate_residual(open_model(tiny_folder), 3, keep_tie=True)
    streams = []
    with torch.no_grad(), strict_float32():
        for source in (plain, rotated):
            runner = CalibrationRunner(source, tokens(), device=torch.device("cpu"), dtype=torch.float32)
            streams.append([runner.hidden(0, full=True).clone() for _ in runner])
    for before, after in zip(*streams, strict=True):
        assert change(after, rotated.rotation(before)) < 1e-2  # of a half-precision checkpoint


def test_the_tie_is_part_of_the_fingerprint(tiny_folder: Path) -> None:
    merged, online = (rotate_residual(open_model(tiny_folder), 0, keep_tie=keep) for keep in (False, True))
    assert merged.fingerprint() != online.fingerprint()
    assert online.notes == (
        "the head stays tied to the embedding: the residual stream is rotated beside them at run time",
    )


@pytest.mark.parametrize(
    "change",
    [{"seed": 1.5}, {"keep_ones": 0}, {"embeddings": "model.embed_tokens"}, {"embeddings": []}, {"norm": None}],
)
def test_a_damaged_entry_of_an_online_rotation_is_refused(change: dict[str, Any]) -> None:
    fields = {"seed": 0, "keep_ones": False, "embeddings": ["model.embed_tokens"], "norm": "model.norm", "offset": 0.0}
    assert StreamRotation.from_dict(fields).to_dict() == fields
    with pytest.raises(TypeError):
        StreamRotation.from_dict(fields | change)


def test_an_untied_model_keeps_its_config() -> None:
    source = rotate_residual(open_model(tiny_model("mistral")), 0)
    assert source.config_changes == {}
    assert source.notes == ()


def test_the_fingerprint_holds_the_seed(tiny_folder: Path) -> None:
    prints = [rotate_residual(open_model(tiny_folder), seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] != open_model(tiny_folder).fingerprint()


def test_rotated_half_precision_is_near(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = rotated_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    source.skeleton.float()
    assert 1e-4 < change(outputs(source.skeleton), outputs(model)) < 0.02


def test_a_bias_too_large_for_its_gain_is_refused() -> None:
    model = tiny_model("stablelm")
    norm = model.model.layers[1].input_layernorm
    norm.weight.data[5], norm.bias.data[5] = 1e-6, 1.0
    with pytest.raises(ModelError, match=r"layers\.1\.input_layernorm\.bias is up to 1e\+06 times the gain"):
        rotate_residual(open_model(model), 0)


def test_a_gain_of_zero_is_no_obstacle_where_readers_have_biases() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[0].self_attn_layer_norm.weight.data[5] = 0.0
    assert change(outputs(rotated_model(model).skeleton), outputs(model)) < 1e-4


def test_outliers_of_the_stream_are_spread() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[:, 7] += 20.0
    source = rotated_model(model)
    embedding: Any = source.skeleton.get_input_embeddings()
    assert peak(embedding.weight) < 3 < 7 < peak(model.model.embed_tokens.weight)


def peak(rows: Tensor) -> float:
    """Largest entry by root mean square, averaged over rows."""
    rows = rows.detach()
    return float((rows.abs().amax(-1) / rows.square().mean(-1).sqrt().clamp(min=1e-9)).mean())

"""Models that cannot be used: damaged, incomplete, of another kind, with code or numbers that are not accepted."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq
from cli.main import main
from ptq.runtime.linear import QuantLinear
from tests.cli.bad_input.commands import Damage, content, edit_json, quantize, sentence

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


# -- models ----------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def scramble(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[20:40] = bytes(range(200, 220))
    (folder / WEIGHTS).write_bytes(bytes(data))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CODE = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewModel"}
MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "has no config.json"),
    "no weights": (remove(WEIGHTS), "has no weights"),
    "truncated": (cut, "model.safetensors is not a readable safetensors file: its header describes"),
    "corrupt": (scramble, "the header of"),
    "missing tensor": (edit_weights(lambda t: t.pop(UP)), f"lacks 1 of the model's tensors ({UP})"),
    "missing shard": (lose_a_shard, "lacks model-00002-of-00002.safetensors, which its index names"),
    "wrong shape": (
        edit_weights(lambda t: t.update({UP: t[UP][:3].clone()})),
        f"{UP} has shape (3, 64)",
    ),
    "pickle": (as_pickle, "pickle weights only (pytorch_model.bin)"),
    "not causal": (edit_json(model_type="bert", architectures=["BertForMaskedLM"]), "ptq quantizes those"),
    "encoder and decoder": (edit_json(model_type="t5"), "is a t5 model, which is not a decoder-only causal"),
    "unknown type": (edit_json(model_type="lama"), "lama"),
    "its own code": (edit_json(model_type="new", auto_map=CODE), "--trust-remote-code"),
    "quantized": (
        edit_json(quantization_config={"quant_method": "gptq"}),
        "is quantized by its config (gptq), but its files hold no such weights",
    ),
    "sizes": (edit_json(num_hidden_layers=3000), "num_hidden_layers is 3000, but the checkpoint has"),
    "config is text": (lambda folder: (folder / "config.json").write_text("{") and None, "config.json is damaged"),
    "config does not fit": (edit_json(hidden_act="nothing"), "nothing"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, wanted = MODELS[name]
    damage(model)
    before = content(model)
    assert quantize(model, tmp_path / "OUT") == 3
    line = sentence(capsys)
    assert wanted in line
    assert "MODEL" in line, "the folder or file"
    assert not (tmp_path / "OUT" / "config.json").exists()
    assert content(model) == before


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("name", ["no weights", "truncated", "pickle", "its own code"])
def test_models_that_are_to_run(
    name: str, command: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, wanted = MODELS[name]
    damage(model)
    rest = ["--text", str(text)] if command == "eval" else ["Once"]
    assert main([command, str(model), *rest]) == 3
    assert wanted in sentence(capsys)


def test_a_model_that_is_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "MODLE", tmp_path / "OUT") == 3
    assert f"there is no folder {tmp_path / 'MODLE'}" in (line := sentence(capsys))
    assert f"Did you mean {model}?" in line
    assert quantize("x" * 3000, tmp_path / "OUT") == 3
    assert quantize(model / WEIGHTS, tmp_path / "OUT") == 3
    assert "is a file" in sentence(capsys)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (remove("tokenizer.json"), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "has no tokenizer that can be read"),
        (
            edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.New", None]}, tokenizer_class="New"),
            "--trust-remote-code",
        ),
    ],
)
def test_tokenizers(
    damage: Damage, wanted: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    assert quantize(model, tmp_path / "OUT", text=text) == 3
    assert wanted in sentence(capsys)


REMOTE = {
    "configuration_new.py": """
        from transformers import LlamaConfig
        class NewConfig(LlamaConfig):
            model_type = "new"
        open({witness!r}, "w").close()
    """,
    "modeling_new.py": """
        from transformers import LlamaForCausalLM
        from .configuration_new import NewConfig
        class NewModel(LlamaForCausalLM):
            config_class = NewConfig
    """,
}


def test_code_of_a_model_runs_with_leave_only_and_from_the_folder_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is no leave"))
    witness = tmp_path / "witness"
    for name, code in REMOTE.items():
        (model / name).write_text(textwrap.dedent(code).format(witness=str(witness)))
    edit_json(model_type="new", auto_map=CODE, _name_or_path="some/repository")(model)
    assert quantize(model, tmp_path / "OUT") == 3
    line = sentence(capsys)
    assert "'configuration_new.py', 'modeling_new.py'" in line
    assert not witness.exists()
    edit_json(auto_map={key: f"some/repository--{value}" for key, value in CODE.items()})(model)
    assert quantize(model, tmp_path / "OUT", "--trust-remote-code") == 3
    assert "fetches nothing" in sentence(capsys)
    assert not witness.exists()
    edit_json(auto_map=CODE)(model)
    assert quantize(model, tmp_path / "OUT", "--trust-remote-code") == 0
    assert witness.exists()


# -- numbers ---------------------------------------------------------------------------------------------------------


def spoil(value: float, count: int = 1) -> Damage:
    return edit_weights(lambda tensors: tensors[UP].view(-1)[:count].fill_(value))


@pytest.mark.parametrize("method", ["rtn", "gptq", "coreq"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(
    method: str, value: float, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(value, count=48)(model)
    assert quantize(model, tmp_path / "OUT", "--method", method, text=text) == 5
    line = sentence(capsys)
    assert UP.removesuffix(".weight") in line
    assert "0.781%" in line, "48 of 96 x 64"


def test_weights_whose_squares_overflow(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_weights(lambda tensors: [tensors[name].fill_(1e20) for name in (UP, UP.replace("up_", "gate_"))])(model)
    assert quantize(model, tmp_path / "OUT", "--method", "gptq", "--dtype", "float32", text=text) == 5
    line = sentence(capsys)
    assert "model.layers.1.mlp.gate_proj: the largest weight is" in line
    assert "overflow float32" in line
    assert "--ignore model.layers.1.mlp.gate_proj" in line


@pytest.mark.parametrize("method", ["rtn", "gptq", "coreq"])
def test_rows_of_zeros_stay_zero_and_repeated_text_is_no_reason_to_stop(
    method: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "aaa.txt"
    text.write_text("a " * 400)  # every position sees the same token: Hessians of a very low rank
    edit_weights(lambda tensors: tensors[UP][::2].zero_())(model)
    assert quantize(model, tmp_path / "OUT", "--method", method, "--bits", "3", text=text) == 0
    packed = ptq.load(tmp_path / "OUT")
    linear = packed.get_submodule(UP.removesuffix(".weight"))
    assert isinstance(linear, QuantLinear)
    weight = linear.quantized().dequantize()
    assert not weight[::2].any()
    assert weight[1::2].any(dim=1).all()
    with torch.no_grad():
        assert packed(input_ids=torch.arange(2, 34)[None]).logits.isfinite().all()

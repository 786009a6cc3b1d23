"""Results whose residual stream is rotated at run time: the tie stays, in the file and in the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import ptq
from calib.data.tokens import Calibration
from ptq.errors import OutputError, UsageError
from ptq.export import export
from tests.support.tiny_models import FAMILIES, tiny_model

TOKENS = torch.randint(2, 400, (6, 24), generator=torch.Generator().manual_seed(5))
CALIBRATION = Calibration(TOKENS, "test", 5, "none")


def quantize(model: Any, out: Path, **fields: Any) -> ptq.Report:
    defaults: dict[str, Any] = {
        "format": "int",
        "bits": 8,
        "group_size": 32,
        "scale_dtype": "float16",
        "container": "native",
    }
    return ptq.quantize(
        model, out=out, method="gptq", calibration=CALIBRATION, rotate=("residual",), **defaults | fields
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def change(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tied(family: str) -> Any:
    return tiny_model(family, tie_word_embeddings=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_tie_stays_in_file_and_model(family: str, tmp_path: Path) -> None:
    model = tied(family)
    merged = quantize(model, tmp_path / "merged", rotate_head="merged")
    online = quantize(model, tmp_path / "online")
    head = model.get_output_embeddings().weight.nbytes
    assert merged.totals["file_bytes"] - online.totals["file_bytes"] >= head
    results = {name: ptq.load(tmp_path / name) for name in ("merged", "online")}
    assert results["online"].get_output_embeddings().weight is results["online"].get_input_embeddings().weight
    for loaded in results.values():
        assert change(logits(loaded), logits(model)) < 0.03  # 8 bits
    assert change(logits(results["online"]), logits(results["merged"])) < 0.01  # solved on the same stream


def test_a_result_saved_again_and_its_base_model_rotate(tmp_path: Path) -> None:
    quantize(tied("llama"), tmp_path / "out")
    loaded = ptq.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))
    base = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = loaded.get_output_embeddings()(base(TOKENS, use_cache=False).last_hidden_state)
    assert change(found, logits(loaded)) < 1e-5


def test_what_keeps_the_tie(tmp_path: Path) -> None:
    """Only where the result is native for another reason, or where it is asked for."""
    model = tied("llama")
    containers = {
        "stock": {"container": "auto"},
        "asked": {"container": "auto", "rotate_head": "online"},
        "asymmetric": {"container": "auto", "symmetric": False, "bits": 3},
        "down": {"container": "auto", "rotate": ("residual", "down")},
    }
    for name, fields in containers.items():
        config = {"rotate": ("residual",), "scale_dtype": "auto"} | fields
        ptq.quantize(model, out=tmp_path / name, method="rtn", group_size=32, **{"bits": 8} | config)
        found = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert ("residual_rotation" in found["quantization_config"]) == (name != "stock"), name
        assert found["tie_word_embeddings"] == (name != "stock")
    with pytest.raises(UsageError, match="rotate_head is online, which the container compressed-tensors cannot say"):
        ptq.quantize(model, out=tmp_path / "no", container="compressed-tensors", rotate_head="online", method="rtn")


def test_exports_say_what_to_do(tmp_path: Path) -> None:
    quantize(tied("llama"), tmp_path / "out")
    with pytest.raises(UsageError, match="--rotate-head merged"):
        export(tmp_path / "out", out=tmp_path / "gptq", format="gptq")
    export(tmp_path / "out", out=tmp_path / "native", format="native")
    assert torch.equal(logits(ptq.load(tmp_path / "native")), logits(ptq.load(tmp_path / "out")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_dense_export_rotates_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gemma", {"head_dim": 16})  # its gains are 1 + weight
    quantize(tied(family), tmp_path / "out")
    export(tmp_path / "out", out=tmp_path / "dense", format="f32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert change(logits(dense), logits(ptq.load(tmp_path / "out"))) < 1e-4


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"seed": 0}, "residual_rotation is damaged"),
        (
            {"seed": 0, "keep_ones": False, "embeddings": ["wte"], "norm": "model.norm", "offset": 0.0},
            "rotated at wte, but",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(entry: dict[str, Any], reason: str, tmp_path: Path) -> None:
    quantize(tied("llama"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["residual_rotation"] = entry
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(OutputError, match=reason):
        ptq.load(tmp_path / "out")

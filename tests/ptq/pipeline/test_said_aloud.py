"""What would go wrong in silence: it is refused, or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq
from calib.data.tokens import Calibration
from calib.model.structure import find_blocks, is_linear
from ptq.errors import DataError, ModelError, NumericalError, OutputError
from ptq.pipeline.events import Event
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (8, 24), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")
OPTIONS: dict[str, Any] = {"bits": 4, "group_size": 16, "calibration": CALIBRATION, "device": "cpu"}


def saved(folder: Path, family: str = "llama", **tensors: torch.Tensor) -> Path:
    """A tiny model's folder with some tensors changed or added (``.`` written as ``__``)."""
    tiny_model(family).save_pretrained(folder)
    file = folder / "model.safetensors"
    changed = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(load_file(file) | changed, file, metadata={"format": "pt"})
    return folder


def test_nan_in_a_tensor_that_passes_through(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", model__norm__weight=torch.full((64,), float("nan")))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: 100% of the weights"):
        ptq.quantize(model, out=tmp_path / "out", method="rtn", **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()


def test_tensors_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", model__layers__9__extra__weight=torch.zeros(4, 4))
    report = ptq.quantize(model, out=tmp_path / "out", method="rtn", **OPTIONS)
    assert any("model.layers.9.extra.weight" in warning for warning in report.warnings)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_eight_bits_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.ones(96, 64).to(dtype)
    model = saved(tmp_path / "model", model__layers__0__mlp__up_proj__weight=weight)
    with pytest.raises(ModelError, match=r"up_proj\.weight is stored as .*quantized already"):
        ptq.quantize(model, out=tmp_path / "out", method="rtn", **OPTIONS)


def test_tokens_beyond_the_embedding_are_a_matter_of_data(tmp_path: Path) -> None:
    calibration = Calibration(TOKENS + 100, "test", 3, "none")
    with pytest.raises(DataError, match=r"token 4\d\d, but the model's embedding has 400 rows"):
        ptq.quantize(tiny_model("llama"), out=tmp_path, **OPTIONS | {"calibration": calibration})


def test_an_index_that_was_changed_is_refused_at_load(tmp_path: Path) -> None:
    ptq.quantize(tiny_model("llama"), out=tmp_path, method="rtn", **OPTIONS)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "layers.1." not in name}
    path.write_text(json.dumps(index))
    with pytest.raises(OutputError, match=r"index\.json was changed .*layers\.1\."):
        ptq.load(tmp_path)


def test_companions_of_an_earlier_model_do_not_stay(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ first }}")
    ptq.quantize(model, out=tmp_path / "out", method="rtn", **OPTIONS)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    ptq.quantize(saved(tmp_path / "other"), out=tmp_path / "out", method="rtn", restart=True, **OPTIONS)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_forecast_tells_of_an_unfinished_run_that_would_be_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")

    def cut(event: Event) -> None:
        if event.kind == "block_done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.quantize(model, out=tmp_path / "out", method="rtn", on_event=cut, **OPTIONS)
    same = ptq.forecast(model, out=tmp_path / "out", method="rtn", **OPTIONS)
    other = ptq.forecast(model, out=tmp_path / "out", method="rtn", **OPTIONS | {"bits": 3})
    assert not any("unfinished" in warning for warning in same.warnings)
    assert any("recipe.scheme.bits was 4 and is now 3" in warning for warning in other.warnings)


def test_a_layer_that_is_rounded_away_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", model__layers__0__mlp__gate_proj__weight=torch.full((96, 64), 1e-9))
    report = ptq.quantize(model, out=tmp_path / "out", method="gptq", **OPTIONS)
    assert any("gate_proj" in warning and "output's energy is lost" in warning for warning in report.warnings)


def test_models_that_change_their_weights_while_they_run_are_refused() -> None:
    model = tiny_model("llama")
    type(model.model)._rescale_layers = lambda self: None
    try:
        with pytest.raises(ModelError, match="changes its weights in place"):
            find_blocks(model)
    finally:
        del type(model.model)._rescale_layers


def test_a_subclass_that_computes_something_else_is_no_linear() -> None:
    class Same(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + (0 if self.bias is None else self.bias)

    class Other(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert is_linear(Same(8, 4))
    assert is_linear(Same(8, 4, bias=False))
    assert not is_linear(Other(8, 4))

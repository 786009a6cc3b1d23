"""LLM-FP4 on whole models: what is written is what was searched, runs alike after loading, and can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from calib.data.tokens import Calibration
from ptq.errors import UsageError
from ptq.pipeline.events import Event
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (8, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 1, "none")


def run(model: Any, out: Path, **fields: Any) -> Any:
    return ptq.quantize(model, method="llm-fp4", out=out, calibration=CALIBRATION, device="cpu", **fields)


def outliers(model: Any) -> Any:
    """The model with norms that make some channels much larger than others."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            with torch.no_grad():
                parameter.mul_(torch.exp2((torch.arange(len(parameter)) % 7 - 3).float()))
    return model


def inputs_of_full(model: Any) -> dict[str, Tensor]:
    """Inputs of every linear of the blocks on the calibration tokens."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("shift", ["kept", "folded", "off"])
def test_every_linear_is_searched_for_the_inputs_of_the_full_model(tmp_path: Path, shift: str) -> None:
    model = outliers(tiny_model("llama"))
    inputs, weights = inputs_of_full(model), dict(model.named_parameters())
    report = run(model, tmp_path / "out", act_bits=4, shift=shift, rounds=2)
    loaded = ptq.load(tmp_path / "out")
    suffix = {"kept": "shifted", "folded": "folded", "off": "static"}[shift]
    assert len(report.layers) == 14
    for layer in report.layers:
        module = loaded.get_submodule(layer.name)
        assert isinstance(module, QuantLinear)
        assert str(module.scheme.act_format).endswith(suffix)
        x, weight = inputs[layer.name], weights[f"{layer.name}.weight"]
        wanted = (x.double() @ weight.double().T).detach()
        found = module(x).double().detach()
        assert layer.loss == pytest.approx(float(((found - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-3)
        assert layer.loss < layer.loss_rtn or shift == "folded"
        assert layer.figures["input max"] == pytest.approx(float(x.max()))
        seen = module.transform_input(x) / module.get_buffer("input_scale")
        if shift != "kept":  # one scale: levels of the format itself
            number = module.scheme.activation_format.number
            torch.testing.assert_close(number.round(seen), seen, rtol=1e-6, atol=0)
    shifts = [layer.figures["largest shift"] for layer in report.layers]
    assert (max(shifts) > 0) == (shift != "off")


def mean_loss(report: Any) -> float:
    return float(sum(layer.loss for layer in report.layers) / len(report.layers))


def test_shifts_and_search_lower_the_error_and_formats_can_be_fixed(tmp_path: Path) -> None:
    model = outliers(tiny_model("llama"))
    losses = {}
    for name, fields in {
        "all": {},
        "no shift": {"shift": "off"},
        "no search": {"search": False},
        "int": {"search": False, "shift": "off", "weight_formats": "e1m2", "act_formats": "e1m2"},
    }.items():
        report = run(model, tmp_path / name, act_bits=4, rounds=2, **fields)
        losses[name] = mean_loss(report)
        formats = {(layer.scheme["format"], layer.scheme["act_format"]) for layer in report.layers}
        if name == "no search":
            assert formats == {("e2m1", "e2m1-shifted")}
        if name == "int":
            assert formats == {("e1m2", "e1m2-static")}
    assert losses["all"] < 0.8 * losses["no shift"]
    assert losses["all"] < 0.9 * losses["no search"]
    assert losses["no shift"] < losses["int"]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe"])  # biases, transposed weights, experts
def test_models_of_other_kinds_load_and_run(tmp_path: Path, family: str) -> None:
    report = run(tiny_model(family), tmp_path / "out", act_bits=8, rounds=1)
    assert all(layer.scheme["act_format"].endswith("-shifted") for layer in report.layers)
    with torch.no_grad():
        assert bool(torch.isfinite(ptq.load(tmp_path / "out")(TOKENS[:2]).logits).all())


def test_weights_alone(tmp_path: Path) -> None:
    report = run(tiny_model("llama"), tmp_path / "out")
    assert {layer.scheme["act_format"] for layer in report.layers} == {None}
    assert all(layer.loss < layer.loss_rtn * 1.001 for layer in report.layers)
    nothing = run(tiny_model("llama"), tmp_path / "minmax", search=False)
    assert mean_loss(report) < mean_loss(nothing)


def test_sequential_sees_what_earlier_linears_lost(tmp_path: Path) -> None:
    """The input of every linear is that in the model quantized so far, its own input not yet rounded."""
    model = outliers(tiny_model("llama"))
    report = run(copy.deepcopy(model), tmp_path / "out", act_bits=4, sequential=True, rounds=1)
    loaded = ptq.load(tmp_path / "out")
    seen = inputs_of_full_packed(loaded)
    weights = dict(model.named_parameters())
    for layer in report.layers:
        module, x = loaded.get_submodule(layer.name), seen[layer.name]
        wanted = (x.double() @ weights[f"{layer.name}.weight"].double().T).detach()
        found = module(x).double().detach()
        assert layer.loss == pytest.approx(float(((found - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-3)


def inputs_of_full_packed(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0]))
    with torch.no_grad():
        model(TOKENS)
    return found


@pytest.mark.parametrize("sequential", [False, True])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, sequential: bool) -> None:
    model = outliers(tiny_model("llama"))
    fields = {"act_bits": 4, "sequential": sequential, "rounds": 1}
    whole = run(model, tmp_path / "whole", **fields)

    def stop(event: Event) -> None:
        if event.kind == "block_done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", on_event=stop, **fields)
    parts = run(model, tmp_path / "parts", **fields)
    assert parts.files == whole.files


def test_what_it_cannot_do_is_refused_before_the_run(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for fields, text in (
        ({"act_bits": 3}, "floating-point inputs of 4 to 8 bits"),
        ({"group_size": 32}, "one scale per output channel"),
        ({"format": "nvfp4", "group_size": 16}, "--format e2m1"),
        ({"act_format": "fp8"}, "--act-bits 4"),
        ({"weight_formats": "e4m3"}, "e2m1"),
        ({"act_bits": 4, "act_formats": "e4m3"}, "e2m1"),
        ({"shift": "yes"}, "kept"),
    ):
        with pytest.raises(UsageError, match=text):
            run(model, tmp_path / "out", **fields)

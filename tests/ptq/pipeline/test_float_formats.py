"""Every floating-point format through a whole run: each kind of solver, written, loaded, the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ptq
from calib.data.tokens import Calibration
from ptq.errors import UsageError
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (6, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 1, "none")
FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8", "fp8-tensor", "fp8-block", "fp4", "e2m1", "e3m0", "e1m2")


def run(model: Any, out: Path, **fields: Any) -> Any:
    return ptq.quantize(model, out=out, calibration=CALIBRATION, device="cpu", **fields)


def quantized_linears(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_through_a_run(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    report = run(model, tmp_path / "out", method="gptq", format=name, container="native")
    loaded = ptq.load(tmp_path / "out")
    layers = quantized_linears(loaded)
    assert {layer.name for layer in report.layers} == set(layers)
    for key, layer in layers.items():
        original = model.get_submodule(key).weight.detach()
        values = layer.dequantize()
        assert layer.scheme.format == name
        error = float((values - original).square().sum() / original.square().sum())
        assert error < {"e3m0": 0.2}.get(name, 0.05 if layer.scheme.bits == 4 else 0.002)
        x = torch.randn(3, values.shape[1], generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(layer(x), x @ values.T + (0 if layer.bias is None else layer.bias))


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"cd_passes": 1}], ids=str)
def test_solvers_round_onto_blocks_better_than_nearest(options: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for method, more in (("rtn", {"scales": "hessian"}), ("coreq", {"scales": "hessian", **options})):
        report = run(tiny_model("llama"), tmp_path / method, method=method, format="nvfp4", **more)
        losses[method] = sum(layer.loss for layer in report.layers)
    assert losses["coreq"] < losses["rtn"]


def test_a_group_shares_its_tensor_scale(tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out", method="rtn", format="nvfp4", container="native")
    layers = quantized_linears(ptq.load(tmp_path / "out"))
    scales = {name.rpartition(".")[2]: layer.get_buffer("weight_global_scale") for name, layer in layers.items()}
    assert torch.equal(scales["q_proj"], scales["k_proj"])
    assert torch.equal(scales["q_proj"], scales["v_proj"])
    assert torch.equal(scales["gate_proj"], scales["up_proj"])
    assert not torch.equal(scales["q_proj"], scales["down_proj"])


@pytest.mark.parametrize("name", ["nvfp4", "fp8-tensor"])
def test_the_record_has_the_range_of_a_static_input(name: str, tmp_path: Path) -> None:
    model, seen = tiny_model("llama"), []
    with model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, x: seen.append(float(x[0].detach().abs().max()))
    ):
        model(TOKENS)
    report = run(model, tmp_path / "out", method="rtn", format=name, act_format=name)
    figures = {layer.name: layer.figures for layer in report.layers}["model.layers.0.self_attn.q_proj"]
    assert figures["input largest"] == pytest.approx(max(seen), rel=1e-3)


def test_what_cannot_be_done_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for fields, message in (
        ({"method": "gptq", "format": "nvfp4", "static_groups": False, "act_order": False}, "static_groups=true"),
        ({"method": "rtn", "format": "mxfp4", "scales": "four_over_six"}, "takes scales=minmax, floor"),
        ({"method": "rtn", "scales": "rceil"}, "number format int takes scales=minmax, pnorm, hessian"),
        ({"method": "omniquant", "format": "nvfp4"}, "Methods that can: coreq, gptaq, gptq"),
        ({"method": "rtn", "format": "nvfp5"}, "Did you mean 'nvfp4'"),
    ):
        with pytest.raises(UsageError, match=message):
            run(tiny_model("llama"), tmp_path / "out", **fields)


def test_a_width_that_no_block_divides_names_the_linear(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj .* cannot be stored as nvfp4: it has 40 input channels") as caught:
        run(tiny_model("llama", hidden_size=40), tmp_path / "out", method="rtn", format="nvfp4")
    assert "; nor can 11 other linears. Give them another scheme (--override '*.q_proj=8'" in str(caught.value)
    with pytest.raises(
        UsageError, match=r"down_proj .64 x 40.* Give it another scheme .--override '[a-z._0]*=8,a0'"
    ) as one:
        run(
            tiny_model("llama", intermediate_size=40, num_hidden_layers=1),
            tmp_path / "out",
            method="rtn",
            preset="NVFP4",
        )
    assert "leave it in full precision (--ignore 'model.layers.0.mlp.down_proj')" in str(one.value)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "fp8", "fp8-tensor", "int8"])
@pytest.mark.parametrize("method", ["rtn", "coreq"])
def test_inputs_are_rounded_as_the_run_saw_them(name: str, method: str, tmp_path: Path) -> None:
    """The loaded layer rounds what it is given with the record of its format and the parameters of its calibration."""
    run(tiny_model("llama"), tmp_path / "out", method=method, bits=8, group_size=32, act_format=name)
    loaded = ptq.load(tmp_path / "out")
    layers = quantized_linears(loaded)
    largest: dict[str, torch.Tensor] = {}
    for key, layer in layers.items():
        record = layer.scheme.activation_format
        assert record is not None
        assert record.name == name
        params = {spec: layer.get_buffer(spec) for spec in record.tensor_specs(layer.in_features)}
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
        wanted = record.round(x, params) @ layer.dequantize().T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), wanted)
        if params:
            (largest[key],) = params.values()
    if largest:
        model = tiny_model("llama")
        first = model.model.layers[0]
        hidden = first.input_layernorm(model.model.embed_tokens(TOKENS)).detach()
        record = layers["model.layers.0.self_attn.q_proj"].scheme.activation_format
        assert record is not None
        (wanted,) = record.fit(hidden.abs().amax((0, 1))).values()
        for key in ("q_proj", "k_proj", "v_proj"):
            torch.testing.assert_close(largest[f"model.layers.0.self_attn.{key}"], wanted)


@pytest.mark.parametrize(
    "preset", ["NVFP4", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8"]
)
def test_numbers_of_compressed_tensors_stay_packed(preset: str, tmp_path: Path) -> None:
    """Loaded in float32, where stock code cannot run all of them, and saved again: always the native form's model."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=128).bfloat16()
    report = run(model, tmp_path / "out", method="rtn", preset=preset)
    assert report.container == "compressed-tensors"
    loaded = ptq.load(tmp_path / "out", dtype=torch.float32)
    layers = quantized_linears(loaded)
    assert {layer.name for layer in report.layers} == set(layers)
    for layer in layers.values():
        torch.testing.assert_close(layer.quantized().dequantize(torch.float32), layer.dequantize(), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    run(model, tmp_path / "native", method="rtn", preset=preset, container="native")
    native = ptq.load(tmp_path / "native", dtype=torch.float32)
    wanted = native(TOKENS).logits
    assert torch.equal(loaded(TOKENS).logits, wanted)
    assert torch.equal(ptq.load(tmp_path / "again", dtype=torch.float32)(TOKENS).logits, wanted)
    keys = [
        {key for file in (tmp_path / name).glob("*.safetensors") for key in load_file(file)}
        for name in ("out", "again")
    ]
    assert keys[0] == keys[1]


def test_experts_without_tokens_take_the_ranges_of_the_others(tmp_path: Path) -> None:
    few = Calibration(TOKENS[:1, :4], "test", 1, "none")
    report = ptq.quantize(
        tiny_model("qwen3_moe"), out=tmp_path / "out", calibration=few, device="cpu", method="rtn", format="nvfp4",
        act_format="nvfp4",
    )  # fmt: skip
    assert any("no token reached it; the range" in text for text in report.warnings)
    for layer in quantized_linears(ptq.load(tmp_path / "out")).values():
        assert float(layer.get_buffer("input_global_scale")) < 1e6


def test_a_killed_run_goes_on_with_the_same_input_ranges(tmp_path: Path) -> None:
    """The blocks after a finished one see its linears with the calibrated inputs that are stored."""
    fields: dict[str, Any] = {"method": "gptq", "format": "nvfp4", "act_format": "nvfp4"}
    run(tiny_model("llama"), tmp_path / "whole", **fields)

    def stop(event: Any) -> None:
        if event.kind == "block_done" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama"), tmp_path / "out", on_event=stop, **fields)
    run(tiny_model("llama"), tmp_path / "out", **fields)
    whole, again = (quantized_linears(ptq.load(tmp_path / name)) for name in ("whole", "out"))
    for name, layer in whole.items():
        assert all(torch.equal(value, again[name].get_buffer(key)) for key, value in layer.named_buffers())


def test_inputs_that_cannot_be_rounded_are_refused(tmp_path: Path) -> None:
    for fields, message in (
        ({"act_format": "nvfp4", "act_bits": 8}, "give one of them"),
        ({"act_format": "nvfp"}, "Did you mean 'nvfp4'"),
        ({"method": "omniquant", "act_format": "fp8", "symmetric": False}, "learns with inputs of --act-bits"),
    ):
        with pytest.raises(UsageError, match=message):
            run(tiny_model("llama"), tmp_path / "out", **fields)
    with pytest.raises(UsageError, match=r"q_proj .* cannot have inputs as nvfp4: its .*q_proj=a0"):
        run(tiny_model("llama", hidden_size=40), tmp_path / "out", method="rtn", act_format="nvfp4")


def test_shifts_of_any_method_are_in_the_report(tmp_path: Path) -> None:
    """The powers of two that the checkpoint stores, under the names that llm-fp4 gives them."""
    report = run(tiny_model("llama"), tmp_path / "out", method="rtn", format="e2m1", act_format="e2m1-shifted")
    layers = quantized_linears(ptq.load(tmp_path / "out"))
    for record in report.layers:
        shift = layers[record.name].get_buffer("input_shift").float()
        assert record.figures["mean shift"] == pytest.approx(float(shift.mean()))
        assert record.figures["largest shift"] == float(shift.max())

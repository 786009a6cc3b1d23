"""Every floating-point format through a whole run: each kind of solver, written, loaded, the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
    assert "--ignore" in str(caught.value)

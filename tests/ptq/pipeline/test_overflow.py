"""Finite models with numbers that float32 cannot square: an error that names the layer, from every method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from calib.runner.forward import MAX_WEIGHT, check_range
from calib.stats import GroupStatistics, LinearStatistics, Moments, Stat, StatisticsAccumulator
from cli.main import main
from ptq.errors import NumericalError
from ptq.methods import METHODS, WindowMethod
from ptq.methods.layerwise.rtn import RTN
from ptq.pipeline.output_error import check_energy, layer_losses
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

NAME = "model.layers.1.self_attn.q_proj"
NEEDS = frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})


def enormous(factor: float = 1e30) -> Any:
    """Its attention is saturated, and every output is sane."""
    model = tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.get_submodule(NAME).weight.mul_(factor)
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_the_layer(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 1} if isinstance(METHODS[method], WindowMethod) else {}
    tokens = torch.arange(128).reshape(8, 16)
    with pytest.raises(NumericalError, match=rf"{NAME}.*e\+2\d.*--ignore"):
        ptq.quantize(
            enormous(),
            method=method,
            calibration=Calibration(tokens, "made up", 0, "0", "0", 64),
            out=tmp_path,
            **{**({} if METHODS[method].defaults else {"bits": 4, "group_size": 32}), **options},
        )
    report = ptq.quantize(
        enormous(), method="gptq", bits=4, group_size=32, ignore=(NAME,), out=tmp_path / "out",
        calibration=Calibration(tokens, "made up", 0, "0", "0", 64),
    )  # fmt: skip
    assert all(math.isfinite(layer.loss or 0.0) for layer in report.layers)


def statistics(scale: float, difference: float = 0.0) -> GroupStatistics:
    inputs = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)) * scale
    accumulator = StatisticsAccumulator("block.linear", {"linear": torch.ones(4, 16)}, NEEDS)
    accumulator.add(inputs, inputs + difference)
    return accumulator.finish()


@pytest.mark.parametrize(
    ("scale", "difference", "what"),
    [
        (1e20, 0.0, "squares of the inputs"),
        (1e10, 1e30, "products of inputs"),
        (1e-3, 1e20, "squares of the mismatch at the outputs"),
    ],
)
def test_sums_that_overflow_name_the_layer(scale: float, difference: float, what: str) -> None:
    with pytest.raises(NumericalError, match=rf"{what}.*block\.linear.*--ignore"):
        statistics(scale, difference)
    assert statistics(1e15).tokens == 16


def test_a_weight_is_refused_beyond_the_limit_only() -> None:
    weight = torch.full((2, 3), MAX_WEIGHT)
    check_range(weight, "x")
    weight[1, 1] *= 1.01
    with pytest.raises(NumericalError, match=r"x: the largest weight is 1\.01e\+12"):
        check_range(weight, "x")


def test_outputs_beyond_float32_are_refused_before_they_are_solved() -> None:
    own = LinearStatistics("linear", GroupStatistics(1, 1, Moments(torch.eye(16) * 1e20, None)))
    check_energy(torch.full((4, 16), 1e5), own)  # 64 e10 * 16 e20
    with pytest.raises(NumericalError, match=r"reach 1\.02e\+35.*--ignore"):
        check_energy(torch.full((4, 16), 1e6), own)


def test_a_loss_that_is_no_number_is_an_error_and_not_a_line_of_the_report() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    quantized = RTN.quantize(weight, None, Scheme(bits=4, group_size=None, scale_dtype="bfloat16"), RTN.config()).weight
    own = LinearStatistics("linear", GroupStatistics(1, 1, Moments(torch.eye(16) * 3e38, None)))
    with pytest.raises(NumericalError, match="not finite"):
        layer_losses(weight * 1e3, quantized, own)


def test_the_command_line_and_the_evaluation_give_json(
    tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enormous().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["quantize", "--method", "rtn", "--bits", "4", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "NumericalError"
    assert NAME in error["message"]
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e20)  # a perplexity of exp(1e20)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Once upon a time there was a model. " * 20)
    arguments = ["eval", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--seqlen", "32"]
    assert main([*arguments, "--max-tokens", "64", "--json"]) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record["record"] == "ptq-eval"

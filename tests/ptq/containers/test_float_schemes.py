"""Floating-point checkpoints in compressed-tensors: stock transformers without ptq has the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from ptq.containers.float_schemes import PAIRS, preset_scheme
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (2, 16), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 1, "none")
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.arange(2, 18)[None])  # decompresses
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith("_proj")}
    torch.save(weights, folder + "/stock.pt")
assert "ptq" not in sys.modules
"""
CASES = [
    ("nvfp4", "nvfp4"),
    ("mxfp4", None),
    ("mxfp8", "mxfp8"),
    ("fp8", "fp8"),
    ("fp8-tensor", "fp8-tensor"),
    ("int8", "int8"),
]


def test_stock_transformers_has_the_same_weights(tmp_path: Path) -> None:
    folders = {}
    for number, inputs in CASES:
        out = tmp_path / f"{number}"
        model = tiny_model("llama").to(torch.bfloat16)
        fields = {"method": "rtn", "format": number, "act_format": inputs}
        report = ptq.quantize(model, out=out, calibration=CALIBRATION, device="cpu", **fields)
        assert report.container == "compressed-tensors"
        assert "vLLM has loaders of its own for" in report.container_reason
        ptq.quantize(model, out=f"{out}-native", calibration=CALIBRATION, device="cpu", container="native", **fields)
        folders[number] = str(out)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK, *folders.values()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, folder in folders.items():
        stock = torch.load(f"{folder}/stock.pt", weights_only=False)
        native = ptq.load(f"{folder}-native", dtype=torch.bfloat16)
        layers = {name: module for name, module in native.named_modules() if isinstance(module, QuantLinear)}
        assert stock.keys() == layers.keys()
        for name, layer in layers.items():
            assert torch.equal(stock[name], layer.dequantize(torch.bfloat16)), (number, name)


def test_4_bit_numbers_stay_packed_in_our_reader_and_round_inputs_as_the_native_form(tmp_path: Path) -> None:
    model, logits = tiny_model("llama").to(torch.bfloat16), {}
    for container in ("compressed-tensors", "native"):
        out = tmp_path / container
        ptq.quantize(
            model, out=out, calibration=CALIBRATION, device="cpu", method="rtn", preset="NVFP4", container=container
        )
        loaded = ptq.load(out, dtype=torch.bfloat16)
        layer = loaded.get_submodule("model.layers.1.mlp.down_proj")
        assert isinstance(layer, QuantLinear)
        assert layer.scheme.act_format == "nvfp4"
        with torch.no_grad():
            logits[container] = loaded(TOKENS).logits
    assert torch.equal(logits["compressed-tensors"], logits["native"])


@pytest.mark.parametrize("pair", PAIRS)
def test_storages_are_what_the_library_infers(pair: tuple[str, str | None]) -> None:
    from compressed_tensors.compressors import BaseCompressor

    scheme = preset_scheme(pair, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(PAIRS[pair][1])
    assert compressor.can_compress(torch.nn.Linear, scheme)

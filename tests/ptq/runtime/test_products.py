"""What reports state of the products that run: the decision of `ptq.runtime.dispatch`, in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ptq
from cli.main import main
from ptq.report import LayerRecord
from ptq.runtime import dispatch
from ptq.runtime.dispatch import REFERENCE
from ptq.runtime.fp8_products import FP8_PRODUCTS
from ptq.runtime.linear import QuantLinear
from ptq.runtime.products import product_rows, products_line
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model


def record(scheme: Scheme, out_features: int = 64) -> LayerRecord:
    shape = (out_features, 64)
    return LayerRecord(
        name="q", method="rtn", scheme=scheme.record(), shape=shape, bits_per_weight=4.0, payload_bytes=1
    )


RECORDS = [
    record(Scheme.of("fp8", act_format="fp8")),
    record(Scheme.of("fp8", act_format="fp8")),
    record(Scheme.of("fp8", act_format="fp8"), out_features=65),
    record(Scheme.of("nvfp4", act_format="nvfp4")),
    record(Scheme(4, act_bits=8)),
    record(Scheme.of("mxfp4")),
]


def test_native_products_and_emulated_inputs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
        return None if out_features % 16 == 0 else "its rows are no multiple of 16"

    native = dataclasses.replace(FP8_PRODUCTS, unsupported_reason=refusal)
    monkeypatch.delenv("PTQ_KERNEL", raising=False)
    monkeypatch.setattr(dispatch, "KERNELS", [native, REFERENCE])
    rows = product_rows(RECORDS, "cuda", torch.bfloat16)
    assert rows[0] == {
        "kernel": "fp8",
        "product": "native FP8, torch._scaled_mm",
        "inputs": "fp8",
        "native": True,
        "linears": 2,
    }
    assert [(row["inputs"], row["native"]) for row in rows[1:]] == [
        ("fp8", False),
        ("nvfp4", False),
        ("int8", False),
        (None, None),
    ]
    assert products_line(rows, "cuda", "bfloat16") == (
        "cuda, bfloat16: reference, dequantized tiles (4 linears), fp8, native FP8, torch._scaled_mm (2 linears); "
        "inputs in fp8 are multiplied as codes; inputs in fp8, nvfp4, int8 are emulated (rounded, multiplied in "
        "floating point)"
    )
    assert {row["kernel"] for row in product_rows(RECORDS, "cpu", torch.float32)} == {"reference"}


def test_the_report_and_inspect_say_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = ptq.quantize(
        tiny_model("llama").to(torch.bfloat16),
        method="rtn",
        preset="FP8_DYNAMIC",
        container="native",
        device="cpu",
        out=tmp_path / "out",
    )
    stated = report.environment["products"]
    assert (stated["device"], stated["dtype"]) == ("cpu", "bfloat16")
    (row,) = stated["rows"]
    assert (row["kernel"], row["inputs"], row["native"], row["linears"]) == ("reference", "fp8", False, 14)
    loaded = [module for module in ptq.load(tmp_path / "out").modules() if isinstance(module, QuantLinear)]
    assert {layer.kernel_name(layer.weight) for layer in loaded} == {row["kernel"]}
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "dequantized tiles (14 linears); inputs in fp8 are emulated" in words
    monkeypatch.setenv("PTQ_KERNEL", "fp8")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "PTQ_KERNEL=fp8 cannot multiply fp8 a-fp8" in " ".join(capsys.readouterr().out.split())

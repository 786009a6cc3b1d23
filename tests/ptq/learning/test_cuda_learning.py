"""Learned methods on a GPU: steps as one CUDA graph, and activations in memory. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from ptq.learning import stepper
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOKENS = torch.randint(2, 400, (8, 32), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {
    "calibration": Calibration(TOKENS, "test", 1, "none"),
    "group_size": 16,
    "bits": 3,
    "symmetric": False,
    "batch": 2,
    "device": "cuda",
    "compute_dtype": "float32",
}


def losses(report: ptq.Report) -> list[float]:
    return [row["loss_after"] for row in report.windows]


@pytest.mark.parametrize("method", ["sliderquant", "sliderquant-lora", "omniquant", "autoround"])
@pytest.mark.parametrize("extra", [{}, {"act_bits": 4, "kv_bits": 4}])
def test_a_graph_learns_what_single_kernels_learn(
    method: str, extra: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    batch = {"batch": 1} if method == "omniquant" else {}
    fields = OPTIONS | {"method": method, "iters": 12} | extra | batch
    captured = ptq.quantize(model, out=tmp_path / "graph", **fields)
    monkeypatch.setattr(stepper, "_can_capture", lambda *_: False)
    single = ptq.quantize(model, out=tmp_path / "single", **fields)
    assert all(row["captured"] for row in captured.windows)
    assert not any(row["captured"] for row in single.windows)
    assert losses(captured) == pytest.approx(losses(single), rel=0.05)


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_activations_elsewhere_give_the_same_losses(offload: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    fields = OPTIONS | {"method": "sliderquant", "iters": 8}
    here = ptq.quantize(model, out=tmp_path / "here", **fields)
    there = ptq.quantize(model, out=tmp_path / "there", offload=offload, **fields)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)


def test_a_mixture_is_not_captured(tmp_path: Path) -> None:
    report = ptq.quantize(tiny_model("mixtral"), out=tmp_path / "out", method="sliderquant", iters=4, **OPTIONS)
    assert not any(row["captured"] for row in report.windows)

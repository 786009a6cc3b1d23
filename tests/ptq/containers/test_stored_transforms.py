"""Stored weight and stored transform belong together, for every method, with and without calibration data.

The folder is read by `independent_reader`; at 8 bits what it says must be the original model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq
from calib.data.tokens import Calibration
from ptq.methods import METHODS, WindowMethod
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.transforms.hadamard import InputRotation
from tests.support.independent_reader import dense_tensors, rotation_matrix
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (6, 24), generator=torch.Generator().manual_seed(5))
CALIBRATION = Calibration(TOKENS, "test", 5, "none")
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "residual": {"rotate": ["residual"]},
    "down": {"rotate": ["down"]},
    "input": {"rotate": ["input"], "rotate_block": 32},
    "both": {"rotate": ["residual", "down"]},
    "down-activations": {"rotate": ["down"], "act_bits": 8},
}
FAST = {"iters": 2, "batch": 2}


def quantize(model: Any, out: Path, method: str, **fields: Any) -> ptq.Report:
    fast = FAST if isinstance(METHODS[method], WindowMethod) else {}
    defaults: dict[str, Any] = {
        "format": "int",
        "bits": 8,
        "group_size": 16,
        "calibration": CALIBRATION,
        "device": "cpu",
    }
    return ptq.quantize(model, out=out, method=method, **defaults | fast | fields)


def divergence(model: Any, out: Path) -> float:
    """Mean KL in nats per token from the original model to the one that the folder describes."""
    own = tiny_model(model.config.model_type, tie_word_embeddings=False)
    tensors = dense_tensors(out)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    own.load_state_dict(tensors)
    before, after = log_probabilities(model), log_probabilities(own)
    return float((before.exp() * (before - after)).sum(-1).mean())


def log_probabilities(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.unsupported_reason(ptq.Scheme(8)) is None]
)
def test_the_folder_describes_the_model(method: str, transform: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    report = quantize(model, tmp_path, method, **TRANSFORMS[transform])
    assert divergence(model, tmp_path) < 2e-3
    rotated = [layer.name for layer in report.layers if layer.scheme.get("input_rotation") is not None]
    kinds = TRANSFORMS[transform].get("rotate", ())
    expected = len(report.layers) if "input" in kinds else 2 if "down" in kinds else 0
    assert len(rotated) == expected, "one linear per block ends it"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_without_calibration_data(transform: str, symmetric: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    report = quantize(model, tmp_path, "rtn", calibration=None, symmetric=symmetric, **TRANSFORMS[transform])
    assert report.calibration is None
    assert divergence(model, tmp_path) < 2e-3


def test_resumed_without_data_the_transform_is_applied(tmp_path: Path) -> None:
    """A finished block's transform is read from its record; the rest get theirs from the run."""
    model, blocks = tiny_model("llama"), []

    def cut(event: Any) -> None:
        if event.kind == "block_done":
            blocks.append(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path, "rtn", calibration=None, rotate=["down"], on_event=cut)
    quantize(model, tmp_path, "rtn", calibration=None, rotate=["down"])
    assert len(blocks) == 1
    assert divergence(model, tmp_path) < 2e-3


def test_a_transform_that_was_not_applied_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizedInputs, "apply", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"down_proj was quantized as .* would be stored as .* rotated"):
        quantize(tiny_model("llama"), tmp_path / "out", "rtn", calibration=None, rotate=["down"])
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("width", [64, 96, 300])
def test_the_readers_rotation_is_the_runtimes(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for block in (None, 32, 256):
        expected = x @ torch.from_numpy(rotation_matrix(width, 11, block)).T
        torch.testing.assert_close(InputRotation(width, 11, block)(x), expected)

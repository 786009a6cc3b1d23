"""``rotate: auto``: what is rotated follows from model and container, and costs no byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.errors import UsageError
from ptq.pipeline.events import Event
from ptq.recipe import Recipe
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (4, 16), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(TOKENS, "test", 3, "none")
SYMMETRIC = {"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "float16"}


def quantize(model: Any, out: Path, **fields: Any) -> tuple[ptq.Report, str]:
    said: list[Event] = []
    scheme = {} if "format" in fields else SYMMETRIC
    defaults: dict[str, Any] = {"method": "gptq", **scheme, "container": "native", "rotate": ("auto",)}
    report = ptq.quantize(model, out=out, calibration=CALIBRATION, on_event=said.append, **defaults | fields)
    return report, "\n".join(event.text for event in said)


@pytest.mark.parametrize(
    ("family", "tied", "fields", "rotated", "reason"),
    [
        ("llama", True, {}, ["residual", "down"], ""),
        ("llama", False, {}, ["residual", "down"], ""),
        ("llama", True, {"symmetric": False, "container": "auto"}, ["residual", "down"], ""),
        ("llama", False, {"container": "auto"}, ["residual"], ""),
        ("llama", True, {"container": "auto"}, [], "the head is tied to the embedding"),
        ("llama", True, {"container": "auto", "rotate_head": "merged"}, ["residual"], ""),
        ("gemma2", True, {}, ["down"], "the residual stream cannot be rotated"),
        ("llama", True, {"method": "rtn"}, [], "rtn does not solve linears on statistics"),
        ("llama", True, {"method": "sliderquant", "iters": 1}, [], "sliderquant does not solve linears on statistics"),
        ("llama", True, {"format": "nvfp4"}, [], "nvfp4 is no integer grid"),
    ],
)
def test_what_is_rotated(
    family: str, tied: bool, fields: dict[str, Any], rotated: list[str], reason: str, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    report, said = quantize(model, tmp_path / "out", **fields)
    assert report.recipe["rotate"] == rotated
    assert f"rotate auto: {', '.join(rotated) or 'none'}" in said
    assert reason in said
    ptq.load(tmp_path / "out")


def test_it_costs_no_byte_of_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    plain, _ = quantize(model, tmp_path / "plain", rotate=())
    rotated, _ = quantize(model, tmp_path / "rotated")
    assert rotated.totals["file_bytes"] - plain.totals["file_bytes"] < 64  # a head of its own is 32,000 bytes


def test_the_same_call_again_finds_it_done(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    first, _ = quantize(tmp_path / "model", tmp_path / "out")
    second, said = quantize(tmp_path / "model", tmp_path / "out")
    assert "nothing is left to do" in said
    assert second == first
    quantize(tmp_path / "model", tmp_path / "out", rotate=("residual", "down"))  # what it was settled to
    with pytest.raises(UsageError, match=r"recipe\.rotate"):
        quantize(tmp_path / "model", tmp_path / "out", rotate=())


def test_auto_stands_alone() -> None:
    assert Recipe(rotate=("auto",)).to_dict()["rotate"] == ["auto"]
    with pytest.raises(UsageError, match="auto stands alone"):
        Recipe(rotate=("auto", "down"))


def test_the_command_says_it(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--method", "gptq", "--bits", "4", "--asym", "--rotate", "auto", "--calib", "pydoc"]
    size = ["--calib-samples", "4", "--calib-seqlen", "16"]
    assert main(["quantize", *said, *size, str(tiny_folder), "-o", str(tmp_path / "out")]) in (0, None)
    assert "rotate auto: residual, down" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "ptq_report.json").read_text())["recipe"]["rotate"] == ["residual", "down"]

"""Without a length of calibration sequences, that of a model with a short context is its context."""

from __future__ import annotations

from pathlib import Path

import pytest

import ptq
from ptq.errors import DataError, UsageError
from ptq.recipe import CalibrationSpec, Recipe
from tests.support.tiny_models import tiny_model


def test_the_usual_length_is_cut_to_the_context_and_a_given_one_is_not() -> None:
    assert CalibrationSpec().fitted(128).seqlen == 128
    assert CalibrationSpec().fitted(131072).seqlen == CalibrationSpec().fitted(None).seqlen == 2048
    assert CalibrationSpec().fitted(1024, usual=512).seqlen == 512
    assert CalibrationSpec(seqlen=4096).fitted(128).seqlen == 4096
    assert Recipe.from_dict(Recipe().to_dict()) == Recipe()
    with pytest.raises(UsageError, match="seqlen must be a whole number"):
        CalibrationSpec(seqlen=0)


def test_a_run_takes_the_length_and_finds_its_result_again(tiny_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "short"
    short = tiny_model("llama", vocab_size=512, max_position_embeddings=32)
    short.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tiny_folder / name).read_bytes())
    fields = {"method": "rtn", "preset": "FP8", "calib": "pydoc", "calib_samples": 2, "device": "cpu"}
    report = ptq.quantize(model, out=tmp_path / "out", **fields)
    assert report.calibration is not None
    assert report.recipe["calibration"]["seqlen"] == report.calibration["seqlen"] == 32
    assert ptq.quantize(model, out=tmp_path / "out", **fields).to_dict() == report.to_dict()
    with pytest.raises(UsageError, match="seqlen"):
        ptq.quantize(model, out=tmp_path / "out", calib_seqlen=16, **fields)
    ptq.quantize(model, out=tmp_path / "shorter", calib_seqlen=16, **fields)
    with pytest.raises(UsageError, match="seqlen"):  # not the same, though nothing was said
        ptq.quantize(model, out=tmp_path / "shorter", **fields)
    with pytest.raises(DataError, match="33 tokens exceed the model's context of 32"):
        ptq.quantize(model, out=tmp_path / "long", calib_seqlen=33, **fields)

"""`ptq eval` puts its scores into the card of a folder of ptq, and into no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ptq
from tests.cli.eval.commands import run_eval


def test_scores_go_into_the_card(
    tiny_folder: Path, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ptq.quantize(str(tiny_folder), method="rtn", bits=4, out=out, device="cpu")
    before = (out / "README.md").read_text()
    assert "None yet" in before
    assert run_eval(out, text_file, "--max-tokens", "100", "--no-card") == 0
    assert (out / "README.md").read_text() == before
    assert run_eval(out, text_file, "--max-tokens", "100", "--against", str(tiny_folder)) == 0
    assert f"scores are in {out / 'README.md'}" in capsys.readouterr().err
    text = (out / "README.md").read_text()
    row = next(line for line in text.splitlines() if ", perplexity |" in line)
    assert " ± " in row.split("|")[3]
    assert " ± " in row.split("|")[4]
    assert "KL" in text
    assert str(tmp_path) not in text
    ptq.load(out)  # the card is none of the files that are verified


def test_other_folders_are_left_alone(
    tiny_folder: Path, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    names = {path.name for path in model.iterdir()}
    assert run_eval(model, text_file, "--max-tokens", "100") == 0
    assert "README" not in capsys.readouterr().err
    assert {path.name for path in model.iterdir()} == names


def test_a_card_that_cannot_be_written_costs_nothing(
    tiny_folder: Path,
    text_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    ptq.quantize(str(tiny_folder), method="rtn", bits=4, out=out, device="cpu")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calib.checkpoint.atomic_files.sync", full)
    assert run_eval(out, text_file, "--max-tokens", "100") == 0
    assert "the scores are not in the model card" in capsys.readouterr().err
    assert "None yet" in (out / "README.md").read_text()

"""Output folders that stay untouched, and disks that fill up."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.main import main
from ptq.report import REPORT_NAME
from tests.cli.bad_input.commands import content, edit_json, quantize, sentence


def test_folders_of_others_stay_untouched(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert quantize(tiny_folder, out) == 6
    assert "is not empty and was not written by ptq" in sentence(capsys)
    assert content(out) == {"thesis.txt": b"years of work"}
    assert quantize(tiny_folder, out / "thesis.txt") == 6
    assert "is a file" in sentence(capsys)
    assert quantize(tiny_folder, tiny_folder) == 6, "the model itself is no place for the output"


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """A function that limits the size of every file that is written from then on; lifted at the end of the test."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (old[0] if size < 0 else size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_fills_up_loses_nothing(
    tiny_folder: Path,
    text: Path,
    tmp_path: Path,
    small_disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "OUT"
    assert quantize(tiny_folder, out, "--bits", "4") == 0
    old = content(out)
    capsys.readouterr()
    small_disk(30_000)  # room for the blocks, not for the embedding after them
    assert quantize(tiny_folder, out, "--method", "gptq", "--bits", "3", "--restart", text=text) == 6
    small_disk(-1)
    line = sentence(capsys)
    assert "cannot write" in line
    assert str(out) in line
    assert content(out) == old, "the earlier result is whole"
    assert quantize(tiny_folder, out, "--method", "gptq", "--bits", "3", text=text) == 0
    assert quantize(tiny_folder, tmp_path / "AT ONCE", "--method", "gptq", "--bits", "3", text=text) == 0
    assert weights(out) == weights(tmp_path / "AT ONCE")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


def test_outputs_of_a_newer_format(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "OUT"
    assert quantize(tiny_folder, out, "--format", "native") == 0
    config = json.loads((out / "config.json").read_text())
    edit_json(quantization_config=config["quantization_config"] | {"version": 99})(out)
    capsys.readouterr()
    assert main(["generate", str(out), "Once"]) == 6
    assert "version 99, this ptq reads version 1: upgrade ptq-toolkit" in sentence(capsys)
    edit_json(REPORT_NAME, version=99)(out)
    assert main(["inspect", str(out)]) == 6
    assert "upgrade ptq-toolkit" in sentence(capsys)

"""Requests, recipes and texts that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.bad_input.commands import quantize, sentence

# -- requests --------------------------------------------------------------------------------------------------------

REQUESTS = {
    "method": ("--method coreg", "unknown method 'coreg'. Did you mean 'coreq'"),
    "option": ("--method coreq -O bem=4", "Did you mean 'beam'"),
    "option's value": ("--method coreq -O beam=many", "'many'"),
    "bits": ("--bits 9", "9"),
    "format": ("--format fp5", "unknown number format 'fp5'. Did you mean"),
    "container": ("--container natve", "native"),
    "method and format": ("--method autoround --format fp4", "Methods that can: coreq, gptaq, gptq, itq3s, rtn"),
    "method and preset": ("--method llm-fp4 --preset NVFP4", "cannot produce nvfp4 a-nvfp4: it has weights of e2m1"),
    "method and fixed groups": ("--method llm-fp4 --format nvfp4", "Methods that can: coreq, gptaq, gptq, itq3s, rtn"),
    "preset and width": ("--method rtn --preset W8A8 --act-bits 16", "W8A8 has act_format='int8', and act_format=None"),
    "preset as format": ("--method rtn --format FP8_DYNAMIC", "given as --preset FP8_DYNAMIC"),
    "method as format": ("--method mxfp4", "given as --format mxfp4"),
    "dtype": ("--dtype float31", "float32"),
    "ignore": ("--ignore *.q_prj", "q_proj"),
    "override": ("--override *.dwn_proj=4", "down_proj"),
    "override's form": ("--override *.down_proj:4", "PATTERN=bits"),
    "flag": ("--bitz 3", "--bitz"),
    "device": ("--device cuda:77", "cuda:77"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, wanted = REQUESTS[name]
    assert quantize(tiny_folder, tmp_path / "OUT", *flags.split()) == 2
    assert wanted in sentence(capsys)
    assert not (tmp_path / "OUT" / "config.json").exists()


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("metod: rtn", "Did you mean 'method'"),
        ("method: !!python/name:os.system", "YAML"),
        ("scheme: {bits: 11}", "from 2 to 8, got 11"),
        ("[", "not valid YAML"),
    ],
)
def test_recipes(
    recipe: str, wanted: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert quantize(tiny_folder, tmp_path / "OUT", "--recipe", str(path)) == 2
    line = sentence(capsys)
    assert wanted in line or ("python" in recipe and "has the tag" in line)
    assert str(path) in line
    assert not (tmp_path / "OUT").exists()


# -- texts -----------------------------------------------------------------------------------------------------------


def test_too_little_text(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox.")
    assert quantize(tiny_folder, tmp_path / "OUT", text=tmp_path / "short.txt") == 4
    line = sentence(capsys)
    assert "tokens; 4 different sequences of 16 need at least 32 (64 without overlap)" in line
    assert "short.txt' has " in line


def test_sequences_longer_than_the_context(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny_folder, tmp_path / "OUT", "--calib-seqlen", "4096", text=text) == 4
    assert "sequences of 4096 tokens exceed the model's context of 2048" in sentence(capsys)


@pytest.mark.parametrize(("written", "wanted"), [(None, "there is no file"), (b"caf\xe9", "is not UTF-8 text: byte 3")])
def test_texts_that_cannot_be_read(
    written: bytes | None, wanted: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "words.txt"
    if written is not None:
        path.write_bytes(written)
    assert quantize(tiny_folder, tmp_path / "OUT", text=path) == 4
    assert wanted in sentence(capsys)
    assert not (tmp_path / "OUT" / "config.json").exists()

"""Names of other toolkits are answered with ours, which exist."""

from __future__ import annotations

import dataclasses
import inspect
import re

import click
import pytest

import ptq
from cli.main import COMMANDS, cli, main
from ptq.api import make_recipe
from ptq.errors import UsageError
from ptq.methods import METHODS
from ptq.recipe import CalibrationSpec, Recipe
from ptq.recipe_files.other_names import _COMMANDS, _EVAL, _QUANTIZE, other_name
from ptq.scheme import Scheme


def options_of(command: str) -> set[str]:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("command", sorted(set(_COMMANDS) & set(COMMANDS)))
def test_every_flag_that_is_offered_exists(command: str) -> None:
    for answer in _COMMANDS[command].values():
        for flag in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", answer):
            assert flag in options_of(command) or flag == "-O", f"{answer} of {command}"


def test_every_argument_and_key_that_is_offered_exists() -> None:
    fields = {field.name for kind in (Recipe, Scheme, CalibrationSpec) for field in dataclasses.fields(kind)}
    fields |= {field.name for method in METHODS.values() for field in dataclasses.fields(method.config)}
    arguments = fields | set(inspect.signature(ptq.quantize).parameters) | {"calib", "calib_samples", "calib_seqlen"}
    for answer in _COMMANDS["python"].values():
        if not answer.endswith("."):
            assert re.findall(r"\w+", answer)[0] in arguments, answer
    for answer in _COMMANDS["recipe"].values():
        if not answer.endswith("."):
            assert re.findall(r"\w+", answer.split()[0])[-1] in fields, answer


@pytest.mark.parametrize("table", [_QUANTIZE, _EVAL])
def test_no_name_stands_for_two_things(table: dict[str, str]) -> None:
    names = [name for row in table.values() for name in row.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["quantize", "M", "--wbits", "4"], "No such option: --wbits. ptq calls this --bits. See ptq quantize --help."),
        (["quantize", "M", "--w_bit", "4"], "ptq calls this --bits."),
        (["quantize", "M", "--dataset", "c4"], "ptq calls this --calib."),
        (["quantize", "M", "--num-calibration-samples", "4"], "ptq calls this --calib-samples."),
        (["quantize", "M", "--max-seq-length", "4"], "ptq calls this --calib-seqlen."),
        (["quantize", "M", "--seqlen", "4"], "ptq calls this --calib-seqlen."),
        (["quantize", "M", "--output_dir", "x"], "ptq calls this -o, --out."),
        (["quantize", "--model", "M"], "ptq takes the model as the first argument, without a flag."),
        (["quantize", "M", "--scheme", "W4A16"], "W4A16 is --bits 4 --group-size 128"),
        (["quantize", "M", "--desc-act"], "-O act_order=true"),
        (["quantize", "M", "--calib_samples", "4"], "ptq writes this --calib-samples."),
        (["eval", "M", "--num_fewshot", "5"], "ptq calls this --fewshot."),
        (["eval", "M", "--dataset", "c4"], "ptq calls this --text."),
        (["generate", "M", "x", "-n", "5"], "ptq calls this --max-new-tokens."),
        (["inspect", "--model", "M"], "ptq takes the folder as the first argument, without a flag."),
        (["quantize", "M", "--bitz", "4"], "No such option"),
    ],
)
def test_the_command_line_answers(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert answer in capsys.readouterr().err


def test_python_answers() -> None:
    with pytest.raises(UsageError, match=r"^unknown argument 'wbits'. ptq calls this bits.$"):
        make_recipe({"wbits": 4})
    with pytest.raises(UsageError, match=r"unknown argument 'output_dir'. ptq calls this out."):
        ptq.quantize("MODEL", output_dir="x")
    with pytest.raises(UsageError, match="Did you mean 'bits'"):
        make_recipe({"bitz": 4})


def test_a_name_that_nobody_has() -> None:
    assert other_name("quantize", "--frobnicate") is None
    assert other_name("nowhere", "--wbits") is None

"""The table of options in docs/learning.md has every option of learned methods, with the defaults of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from cli.shared.method_flags import METHOD_FLAGS
from ptq.learning import LearnedConfig
from ptq.methods import METHODS, WindowMethod

PAGE = (Path(__file__).parents[2] / "docs" / "learning.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("\n## Options\n")[1].split("\n## ")[0].splitlines()
    if line.startswith("| `") or line.startswith("| option")
]
HEAD, BODY = [cell.strip("`") for cell in ROWS[0]], ROWS[1:]
LEARNED = {name: method for name, method in METHODS.items() if isinstance(method, WindowMethod)}
IN_WORDS = ("epochs", "lr_lora", "lr_clip", "lr_scale", "lr_offset")  # of the bits or the steps: 0 in the config


def named(cell: str) -> list[str]:
    """Names in code marks."""
    return re.findall(r"`([^`]+)`", cell)


def number(cell: str) -> str:
    """A default as the page writes it, without code marks and remarks."""
    return cell.strip("`").removesuffix(" (off)")


def test_every_option_and_every_method_has_its_place() -> None:
    options = [option for row in BODY for option in named(row[0])]
    assert sorted(options) == sorted(field.name for field in dataclasses.fields(LearnedConfig))
    assert HEAD[2:] == list(LEARNED)


def test_flags_are_those_of_the_command_line() -> None:
    flags = {option: METHOD_FLAGS[option].flag for option in METHOD_FLAGS if option != "beam"}
    assert {option: flag for row in BODY for option, flag in zip(named(row[0]), named(row[1]), strict=False)} == flags


@pytest.mark.parametrize("name", LEARNED)
def test_defaults_are_those_of_the_code(name: str) -> None:
    config = LEARNED[name].config()
    for row in BODY:
        options, cell = named(row[0]), row[HEAD.index(name)]
        values = [getattr(config, option) for option in options]
        if options[0] in IN_WORDS or not cell:
            assert options[0] in IN_WORDS or values[0] == 0 or config.schedule == "single", row
            continue
        assert number(cell) == ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


@pytest.mark.parametrize("name", ["sliderquant", "autoround"])
def test_steps_on_the_method_pages(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `--iters`"))
    assert str(LEARNED[name].config().iters) in row

"""The group of commands: what help costs, what an error looks like, which code comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import click
import pytest

from calib.errors import DataError, ModelError, NumericalError, OutputError, PtqError, UsageError
from cli.main import COMMANDS, main

ERRORS = [PtqError, UsageError, ModelError, DataError, NumericalError, OutputError]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """``ptq methods`` replaced by a command that raises ``broken.error``."""
    holder = SimpleNamespace(error=PtqError("nothing"))

    def fail(as_json: bool) -> None:
        raise holder.error

    command = click.Command("methods", params=[click.Option(["--json", "as_json"], is_flag=True)], callback=fail)
    monkeypatch.setattr("cli.methods.command", command)
    return holder


def test_help_lists_every_command_and_loads_no_torch() -> None:
    code = "import sys; from cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, entry in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert entry.summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    assert f"ptq {name}" in shown
    assert ("--json" in shown) == (name != "serve")  # a server ends without a result


def test_version_is_the_distribution_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ptq {version('ptq-toolkit')}\n"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_unknown_command_offers_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantise", "MODEL"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown command 'quantise'. Did you mean 'quantize'?" in shown.err


def test_unknown_option_names_the_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "MODEL", "--bitz", "3"]) == 2
    shown = capsys.readouterr().err
    assert "--bitz" in shown
    assert "See ptq quantize --help." in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_become_one_line_and_their_code(
    kind: type[PtqError], broken: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.error = kind("layer x:\n  value 3, limit 2")
    assert main(["methods"]) == kind.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: layer x: value 3, limit 2\n"


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_objects_in_json_mode(
    kind: type[PtqError], broken: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.error = kind("layer x")
    assert main(["methods", "--json"]) == kind.exit_code
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": {"kind": kind.__name__, "message": "layer x"}}
    assert shown.err == ""


def test_json_after_two_dashes_is_not_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "OUT", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_ctrl_c_is_130(broken: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    broken.error = KeyboardInterrupt()
    assert main(["methods"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_an_error(broken: SimpleNamespace) -> None:
    broken.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


def test_the_installed_command_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "cli.main", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:4]) == (0, "ptq ")

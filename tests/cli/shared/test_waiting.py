"""How OpenMP's threads wait is set before torch is loaded, and only where the user has not chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cli.shared.terminal.waiting import SPIN_CHOICES, wait_asleep


def test_threads_sleep_where_nothing_was_chosen() -> None:
    environment = {"PATH": "/bin"}
    wait_asleep(environment)
    assert environment == {"PATH": "/bin", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", SPIN_CHOICES)
def test_a_users_choice_stays(name: str) -> None:
    environment = {name: "1000"}
    wait_asleep(environment)
    assert environment == {name: "1000"}


def test_the_command_line_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys; from cli.main import main; assert 'torch' not in sys.modules; main(['--help']); "
        "assert 'torch' not in sys.modules; sys.exit(os.environ.get('OMP_WAIT_POLICY') != 'PASSIVE')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SPIN_CHOICES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

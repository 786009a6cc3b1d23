"""The bytes that small runs write are those of the table: who moves or renames code changes none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptq.methods import METHODS
from ptq.pipeline.events import Event
from tests.support.bytes_table import CASES, TABLE, environment, known, write_case

CUTS = {"coreq asym": 1, "gptq experts": 1, "autoround sym": 1, "sliderquant-lora sym": 3}
"""Cases that are interrupted after so many visits of blocks, and go on."""


class Cut(Exception):
    """The accident."""


@pytest.fixture(scope="module")
def row() -> dict[str, dict[str, str]]:
    here, rows = environment(), known()
    if here not in rows:
        pytest.skip(f"{TABLE.name} has no row for {here}; it has {'; '.join(rows)}")
    return rows[here]


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_table(case: str, row: dict[str, dict[str, str]], tmp_path: Path) -> None:
    if case not in row:
        pytest.skip(f"{TABLE.name}: the row of this environment was written before the case")
    assert write_case(case, tmp_path) == row[case]


@pytest.mark.parametrize("case", CUTS)
def test_interrupted_runs_give_the_same_bytes(case: str, row: dict[str, dict[str, str]], tmp_path: Path) -> None:
    if case not in row:
        pytest.skip(f"{TABLE.name}: the row of this environment was written before the case")

    visits = 0

    def cut(event: Event) -> None:
        nonlocal visits
        visits += event.kind == "block_done"
        if visits == CUTS[case]:
            raise Cut

    with pytest.raises(Cut):
        write_case(case, tmp_path, cut)
    assert write_case(case, tmp_path) == row[case]


def test_a_case_runs_on_one_thread_whatever_is_set(tmp_path: Path) -> None:
    """The order of sums depends on the number of threads, and so do bytes."""
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        write_case("rtn sym", tmp_path, lambda event: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_every_method_is_in_the_table() -> None:
    assert {options["method"] for options in CASES.values()} == set(METHODS)
    assert all(set(row) <= set(CASES) for row in known().values())

"""Progress: plain lines with the time left, and a bar that names the layer on a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from cli.shared.terminal.progress import ProgressListener, duration
from cli.shared.terminal.screen import Screen
from ptq.pipeline.events import Event


def ticking(step: float) -> Callable[[], float]:
    """A clock that moves by ``step`` seconds at every look."""
    seen = [0.0]

    def look() -> float:
        seen[0] += step
        return seen[0]

    return look


def run(listener: ProgressListener, start: int) -> None:
    with listener:
        listener(Event("message", text="format: [native] because"))
        listener(Event("blocks", done=start, total=4))
        listener(Event("layer", name="model.layers.1.mlp.down_proj"))
        listener(Event("layer_done"))
        listener(Event("block_done", done=start + 1, total=4))


def test_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    run(ProgressListener(Screen(file=text), ticking(10)), start=0)
    assert text.getvalue().splitlines() == [
        "format: [native] because",
        "4 blocks",
        "block 1/4  10.0 s elapsed  30.0 s left",
    ]


def test_lines_count_what_the_work_is_about() -> None:
    text = io.StringIO()
    with ProgressListener(Screen(file=text), ticking(10)) as listener:
        listener(Event("blocks", "sequences: 4 products each", total=2))
        listener(Event("block_done", done=1, total=2))
    assert text.getvalue().splitlines()[0] == "2 sequences: 4 products each"
    assert text.getvalue().splitlines()[1].startswith("sequence 1/2 ")


def test_blocks_done_by_an_earlier_run_do_not_flatter_the_estimate() -> None:
    text = io.StringIO()
    run(ProgressListener(Screen(file=text), ticking(10)), start=2)
    assert text.getvalue().splitlines()[-1] == "block 3/4  10.0 s elapsed  10.0 s left"


def test_a_bar_on_a_terminal_names_the_layer_and_is_taken_down() -> None:
    text = io.StringIO()
    screen = Screen(file=text, force_terminal=True, width=120)
    with ProgressListener(screen) as listener:
        listener(Event("blocks", total=4))
        listener(Event("layer", name="model.layers.1.mlp.down_proj"))
        listener._bar.refresh()  # type: ignore[union-attr]
        assert "model.layers.1.mlp.down_proj" in text.getvalue()
        listener(Event("block_done", done=1, total=4))
    assert "1/4" in text.getvalue()
    assert text.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the cursor is back"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

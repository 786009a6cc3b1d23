"""Several processes: the same bytes as one, and an end with a clear sentence when one of them dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from ptq.pipeline.loops.layerwise import owners
from tests.support.tiny_models import tiny_model


class Ended(NamedTuple):
    """A process that is over."""

    code: int
    out: str
    error: str


def program(rank: int, count: int, port: int, arguments: list[str], logs: str, dies: bool) -> None:
    """What every process runs. One that is to die does so before its second block is done."""
    import torch

    import calib.runner.runner
    from cli.main import main

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    if dies:
        close = calib.runner.runner.BlockContext.close

        def die(context: Any) -> None:
            if context.index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            close(context)

        calib.runner.runner.BlockContext.close = die  # type: ignore[method-assign]
    with (
        open(f"{logs}.out", "w", buffering=1) as out,
        open(f"{logs}.err", "w", buffering=1) as error,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        code = main(arguments)
    os._exit(code)


def launch(count: int, arguments: list[str], folder: Path, dies: int = -1) -> list[Ended]:
    """What torchrun does on one machine; a server that has imported everything forks the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cli.quantize", "ptq"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        inputs = (rank, count, port, arguments, str(folder / f"log{rank}"), rank == dies)
        processes.append(context.Process(target=program, args=inputs))
        processes[-1].start()
    for process in processes:
        process.join(100)
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging
    logs = [(folder / f"log{rank}.{kind}").read_text() for rank in range(count) for kind in ("out", "err")]
    return [Ended(p.exitcode or 0, logs[2 * i], logs[2 * i + 1]) for i, p in enumerate(processes)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "ptq_report.json"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Model, method and calibration as arguments: a dense model's blocks have four groups, a mixture's many."""
    folder = tmp_path_factory.mktemp("workers")
    tiny_model("qwen3_moe", vocab_size=len(tiny_tokenizer)).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 200)
    return [
        *("quantize", str(folder / "model"), "--method", "coreq", "--group-size", "16", "--device", "cpu"),
        *("--calib", str(folder / "text.txt"), "--calib-samples", "16", "--calib-seqlen", "24"),
    ]


def test_one_two_and_four_processes_give_the_same_bytes(setting: list[str], tmp_path: Path) -> None:
    for count in (1, 2, 4):
        results = launch(count, [*setting, "-o", str(tmp_path / str(count))], tmp_path)
        assert [result.code for result in results] == [0] * count, results[0].error
        assert "written to" in results[0].out
        assert all(result.out == "" for result in results[1:])  # one of them speaks
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")


def test_a_process_that_dies_ends_the_run_which_can_be_resumed(setting: list[str], tmp_path: Path) -> None:
    arguments = [*setting, "-o", str(tmp_path / "out")]
    first, second = launch(2, arguments, tmp_path, dies=1)
    assert second.code == -9
    assert first.code == 7
    assert "another process of this run has ended" in first.error
    assert "the same command goes on" in first.error
    assert not (tmp_path / "out" / "config.json").exists()
    assert [result.code for result in launch(2, arguments, tmp_path)] == [0, 0]
    assert launch(1, [*setting, "-o", str(tmp_path / "whole")], tmp_path)[0].code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_more_processes_than_batches_are_refused(setting: list[str], tmp_path: Path) -> None:
    results = launch(2, [*setting, "--calib-samples", "1", "-o", str(tmp_path / "out")], tmp_path)
    assert all(result.code == 2 for result in results)
    assert "start at most 1" in results[0].error


def test_solves_are_shared_out_by_cost() -> None:
    assert owners([9, 3, 3], 2) == [0, 1, 1]
    assert owners([1, 1, 1, 1], 4) == [0, 1, 2, 3]
    assert owners([5, 4], 1) == [0, 0]

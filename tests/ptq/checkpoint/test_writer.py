"""The writer after a crash: killed at every file operation and at random moments, resumed, compared byte for byte."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq.checkpoint import journal, writer
from ptq.checkpoint.journal import JOURNAL_NAME, Journal
from ptq.checkpoint.verify import verify_files
from ptq.checkpoint.writer import LOCK, STAGING, CheckpointWriter
from ptq.errors import OutputError
from ptq.report import REPORT_NAME, Report
from tests.support.reports import empty_report

CONDITIONS = {"recipe.scheme.bits": 3, "threads": 1}
PARTS = ("block.0", "block.1", "rest")
OPERATIONS = {"open", "os.rename", "os.remove", "os.truncate", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
NEW = {
    name: {f"{name}.weight_packed": torch.arange(5_000) + i, f"{name}.norm": torch.full((9,), i / 3).bfloat16()}
    for i, name in enumerate(PARTS)
}
OLD = {name: {f"{name}.weight": torch.zeros(9)} for name in ("block.0", "rest")}


def complete(out: Path, parts: dict[str, dict[str, Tensor]] = NEW, **options: Any) -> list[str]:
    """One run from start to end; returns the names of the parts that it found finished."""
    with CheckpointWriter(out, CONDITIONS, **options) as checkpoint:
        found = [part.name for part in checkpoint.finished]
        for index, (name, tensors) in enumerate(parts.items()):
            if name in found:
                again = checkpoint.read_part(name)
                assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
            else:
                checkpoint.write_part(name, tensors, {"index": index})
        assert [part.payload["index"] for part in checkpoint.finished] == list(range(len(parts)))
        (checkpoint.companions / "tokenizer.json").write_text("{}")
        (checkpoint.companions / "templates").mkdir()
        (checkpoint.companions / "templates" / "tool.jinja").write_text("x")
        report = empty_report("native", files=checkpoint.files())
        checkpoint.finish({"model_type": "llama"}, {"quant_method": "ptq"}, report)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without what belongs to a run under way."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if STAGING not in path.parts}


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """The exit status of a forked process that did ``work``, or the negative number of the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the child needs none of them
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs ends the test, not the day
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(out: Path, number: int) -> None:
    """A run that SIGKILL ends at the file operation ``number`` in ``out``."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and str(arguments[0]).startswith(str(out)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    complete(out)


def killed_in_place(out: Path) -> None:
    """A run that SIGKILL ends when everything is in place and the journal is about to be removed."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.remove" and Path(arguments[0]) == out / STAGING / JOURNAL_NAME:
            os.kill(os.getpid(), signal.SIGKILL)

    CheckpointWriter(out, CONDITIONS).release()  # removes an old journal now
    sys.addaudithook(watch)
    complete(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    complete(out)
    return content(out)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an earlier run of another model."""
    out = tmp_path_factory.mktemp("older") / "out"
    complete(out, OLD)
    return out


@pytest.mark.parametrize("remainder", range(4))
def test_killed_at_every_file_operation(remainder: int, tmp_path: Path, whole: dict[str, bytes], older: Path) -> None:
    before = content(older)
    status, number, kept = -signal.SIGKILL, remainder + 1, list[int]()
    while status == -signal.SIGKILL:
        out = tmp_path / str(number)
        shutil.copytree(older, out)
        status = in_child(lambda out=out, number=number: killed_at(out, number))  # type: ignore[misc]
        if (out / "config.json").exists():  # then it is a result, the old one or the new one
            assert content(out) in (before, whole)
        kept.append(len(complete(out)))
        assert content(out) == whole
        assert not (out / STAGING).exists()
        number += 4
    assert status == 0  # the last number was beyond the end
    assert set(kept) == {0, 1, 2, 3}
    assert kept[:-2] == sorted(kept[:-2])  # nothing finished was ever lost, until all was in place


@pytest.mark.parametrize("remainder", range(3))
def test_killed_while_it_finishes_again(remainder: int, tmp_path: Path, whole: dict[str, bytes]) -> None:
    first, number, status = tmp_path / "first", remainder + 1, -signal.SIGKILL
    assert in_child(lambda: killed_in_place(first)) == -signal.SIGKILL
    assert content(first) == whole
    while status == -signal.SIGKILL:
        out = tmp_path / str(number)
        shutil.copytree(first, out)
        status = in_child(lambda out=out, number=number: killed_at(out, number))  # type: ignore[misc]
        assert content(out) == whole or not (out / "config.json").exists()
        ends = not (out / STAGING / JOURNAL_NAME).exists()
        assert complete(out) == ([] if ends else list(PARTS))
        assert content(out) == whole
        number += 3
    assert status == 0


def test_killed_again_and_again_at_random_moments(tmp_path: Path, whole: dict[str, bytes]) -> None:
    generator = random.Random(3)
    start = time.perf_counter()
    complete(tmp_path / "timing")
    seconds = time.perf_counter() - start
    kills = 0
    for number in range(12):
        out, limit = tmp_path / str(number), seconds / 2
        status = -signal.SIGKILL
        while status != 0:
            status = in_child(lambda out=out: complete(out), generator.uniform(0, limit))  # type: ignore[misc]
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            limit *= 1.3
        assert content(out) == whole
    assert kills > 0


def test_a_part_that_is_finished_is_not_done_again(tmp_path: Path) -> None:
    checkpoint = CheckpointWriter(tmp_path, CONDITIONS)
    checkpoint.write_part("block.0", NEW["block.0"], {"index": 0})
    checkpoint.release()
    assert complete(tmp_path) == ["block.0"]
    assert verify_files(tmp_path) == 3
    assert complete(tmp_path) == []  # a finished folder is begun anew


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_damaged_shard_and_all_after_it_are_done_again(damage: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
        paths = [checkpoint.write_part(name, NEW[name], {"index": i}) for i, name in enumerate(PARTS)]
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data if damage == "changed" else data[:-8])
    if damage == "missing":
        paths[1].unlink()
    with CheckpointWriter(tmp_path, CONDITIONS) as again:
        assert [part.name for part in again.finished] == ["block.0"]
        (note,) = again.notes
        assert paths[1].name in note
        assert "block.1 and the 1 after it are done again" in note
        assert {path.name for path in again.staging.iterdir()} == {JOURNAL_NAME, paths[0].name}
    assert complete(tmp_path) == ["block.0"]
    assert content(tmp_path) == whole


def test_other_conditions_are_refused_with_both_values(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
        checkpoint.write_part("block.0", NEW["block.0"], {"index": 0})
    with pytest.raises(OutputError, match=r"scheme\.bits was 3 and is now 4; threads was 1 and is now 2.*--restart"):
        CheckpointWriter(tmp_path, {"recipe.scheme.bits": 4, "threads": 2})
    with CheckpointWriter(tmp_path, {**CONDITIONS, "offload": "disk"}) as other:
        assert len(other.finished) == 1
    assert complete(tmp_path) == ["block.0"]  # refusals changed nothing
    with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
        checkpoint.write_part("block.0", {"wrong": torch.zeros(1)})
    assert complete(tmp_path, restart=True) == []
    assert content(tmp_path) == whole


def test_staging_of_a_run_that_cannot_be_continued_is_removed(tmp_path: Path) -> None:
    for conditions in (None, CONDITIONS):
        with CheckpointWriter(tmp_path) as checkpoint:
            path = checkpoint.write_part("block.0", NEW["block.0"])
        if conditions:
            (path.parent / JOURNAL_NAME).unlink()  # lost
        with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
            assert checkpoint.finished == checkpoint.notes == []
            assert not path.exists()


def test_a_newer_journal_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal, "JOURNAL_VERSION", 2)
        with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
            path = checkpoint.write_part("block.0", NEW["block.0"])
    with pytest.raises(OutputError, match="version 2"):
        CheckpointWriter(tmp_path, CONDITIONS)
    assert path.exists()
    CheckpointWriter(tmp_path, CONDITIONS, restart=True)  # and the refusal left no lock
    assert not path.exists()


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace", "read_hash"])
def test_disk_full_in_the_middle(
    where: str, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        if where == "save_file":
            Path(arguments[1]).write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = CheckpointWriter(tmp_path, CONDITIONS)
    checkpoint.write_part("block.0", NEW["block.0"], {"index": 0})
    target = {"save_file": (writer, "save_file"), "read_hash": (writer, "file_sha256")}.get(where, (os, where))
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OutputError, match=r"shard-00001.*No space left on device.*the same command goes on"):
            checkpoint.write_part("block.1", NEW["block.1"], {"index": 1})
    assert not list(checkpoint.staging.glob("*.tmp"))
    checkpoint.release()
    assert complete(tmp_path) == ["block.0"]
    assert content(tmp_path) == whole


def test_disk_full_in_finish(tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, 0

    def sometimes(source: Any, target: Any) -> None:
        nonlocal calls
        calls += Path(target).parent == tmp_path
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    for failing in range(1, 8):  # noqa: B007  # three shards, index, report, tokenizer, config
        calls = 0
        with pytest.raises(OutputError, match="No space left"):
            complete(tmp_path)
    failing = -1
    assert complete(tmp_path) == list(PARTS)
    assert content(tmp_path) == whole


def test_names_are_unique_after_resuming_too(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
        checkpoint.write_part("block.0", NEW["block.0"])
    with CheckpointWriter(tmp_path, CONDITIONS) as checkpoint:
        with pytest.raises(ValueError, match=r"the part block\.0 was written before"):
            checkpoint.write_part("block.0", NEW["block.1"])
        with pytest.raises(ValueError, match=r"block\.0\.norm was written before"):
            checkpoint.write_part("other", {"block.0.norm": torch.zeros(1)})
        with pytest.raises(KeyError):
            checkpoint.read_part("block.1")


def test_a_journal_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, CONDITIONS) as checkpoint:
        path = checkpoint.write_part("block.0", NEW["block.0"])
        entry = checkpoint.finished[0]
    treasure = tmp_path / "treasure.safetensors"
    treasure.write_bytes(path.read_bytes())
    forged = Journal.create(path.parent, CONDITIONS)
    forged.add_part(entry)
    forged.add_finishing(["../treasure.safetensors"])
    path.unlink()
    with CheckpointWriter(out, CONDITIONS) as checkpoint:
        assert checkpoint.finished == []
    assert treasure.exists()


def test_the_report_names_every_weight_file(tmp_path: Path) -> None:
    complete(tmp_path)
    files = Report.load(tmp_path).files
    assert set(files) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert {name: row["bytes"] for name, row in files.items()} == {n: (tmp_path / n).stat().st_size for n in files}
    assert REPORT_NAME not in files

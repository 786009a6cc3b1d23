"""The journal: golden bytes, torn and damaged lines, a full disk, conditions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.checkpoint.journal import JOURNAL_NAME, MAY_CHANGE, FinishedPart, Journal, changed_conditions, flatten
from ptq.errors import OutputError

CONDITIONS = {"recipe.scheme.bits": 3, "threads": 1, "model.source": "MODEL"}


def part(index: int, **payload: Any) -> FinishedPart:
    return FinishedPart(f"block.{index}", f"shard-{index:05d}.safetensors", 100 + index, "ab" * 32, payload)


def write(folder: Path, parts: int = 2, names: bool = False) -> Journal:
    journal = Journal.create(folder, CONDITIONS)
    for index in range(parts):
        journal.add_part(part(index, layers=[{"loss": 0.1 + index}], note="größer"))
    if names:
        journal.add_finishing(["a", "b"])
    return journal


def read(folder: Path) -> Journal:
    journal = Journal.read(folder)
    assert journal is not None
    return journal


def test_golden_bytes(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, {"b": 1, "a": [None, 0.5]})
    journal.add_part(FinishedPart("x", "shard-00000.safetensors", 7, "0f", {"n": "ä"}))
    journal.add_finishing(["model.safetensors"])
    lines = [
        '{"conditions":{"a":[null,0.5],"b":1},"kind":"header","version":1}',
        '{"bytes":7,"file":"shard-00000.safetensors","kind":"part","name":"x","payload":{"n":"ä"},"sha256":"0f"}',
        '{"kind":"finishing","names":["model.safetensors"]}',
    ]
    expected = []
    for line in lines:
        check = hashlib.sha256(line.encode()).hexdigest()[:16]
        key = min((k for k in json.loads(line) if k > "check"), key=str)
        expected.append(line.replace(f'"{key}":', f'"check":"{check}","{key}":', 1))
    assert (tmp_path / JOURNAL_NAME).read_text(encoding="utf-8").splitlines() == expected


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written, again = write(tmp_path, names=True), read(tmp_path)
    assert (again.conditions, again.parts, again.names) == (CONDITIONS, written.parts, ["a", "b"])
    assert again.parts[1].payload == {"layers": [{"loss": 1.1}], "note": "größer"}
    assert not again.torn
    assert Journal.read(tmp_path / "elsewhere") is None


def test_payloads_come_back_the_same_before_and_after_a_crash(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, {})
    journal.add_part(part(0, shape=(2, 3)))
    assert journal.parts == read(tmp_path).parts
    assert journal.parts[0].payload == {"shape": [2, 3]}


@pytest.mark.parametrize("payload", [{"loss": float("nan")}, {"path": Path()}])
def test_only_plain_data_is_taken(payload: dict[str, Any], tmp_path: Path) -> None:
    journal = write(tmp_path, 1)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    with pytest.raises((TypeError, ValueError)):
        journal.add_part(part(1, **payload))
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


def test_a_crash_at_any_byte_costs_the_last_line_only(tmp_path: Path) -> None:
    write(tmp_path, 2, names=True)
    path = tmp_path / JOURNAL_NAME
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted(
        {*range(0, len(data), 7), *(end + i for end in ends for i in (-2, -1, 0, 1) if end + i <= len(data))}
    ):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        journal = Journal.read(tmp_path)
        if whole == 0:
            assert journal is None
            continue
        assert journal is not None
        assert len(journal.parts) == min(whole - 1, 2)
        assert (journal.names is not None) == (whole == 4)
        assert journal.torn == (size not in ends)
        assert path.read_bytes() == data[: ends[whole - 1]]
    for tail in (b"\0" * 4096, b"old\nsectors\n"):  # a size that reached the disk before its data
        path.write_bytes(data + tail)
        assert read(tmp_path).names == ["a", "b"]
        assert path.read_bytes() == data


def test_it_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-5])
    read(tmp_path).add_part(part(7))
    assert [p.name for p in read(tmp_path).parts] == ["block.0", "block.7"]


@settings(deadline=None, max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_is_seen(position: float, byte: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write(folder, 2)
        data = bytearray((folder / JOURNAL_NAME).read_bytes())
        last = data[:-1].rindex(b"\n")  # the newline before the last line
        where = int(position * len(data))
        changed, data[where] = data[where] != byte, byte
        (folder / JOURNAL_NAME).write_bytes(data)
        refused = pytest.raises(OutputError, match="--restart") if changed and where < last else nullcontext()
        with refused:
            assert read(folder).parts == written.parts[: (0 if where == last else 1) if changed else 2]


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    for text in (lines[0] + b"\0\0\n" + lines[2], lines[0] + lines[1].replace(b"100", b"101") + lines[2]):
        path.write_bytes(text)
        with pytest.raises(OutputError, match=r"damaged: line 2 does not carry its own checksum.*--restart"):
            Journal.read(tmp_path)
    path.write_bytes(lines[1] + lines[2])
    with pytest.raises(OutputError, match="line 1 is not a header"):
        Journal.read(tmp_path)
    path.write_bytes(lines[0] + lines[0])
    with pytest.raises(OutputError, match="line 2 has the kind 'header' here"):
        Journal.read(tmp_path)


def test_a_newer_version_is_refused_whatever_its_lines_look_like(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"kind":"header","version":2}\nnot a line of ours\n')
    with pytest.raises(OutputError, match=r"has version 2, this ptq reads up to 1: upgrade.*--restart"):
        Journal.read(tmp_path)


def test_forgetting_parts(tmp_path: Path) -> None:
    journal = write(tmp_path, 3, names=True)
    journal.keep_parts(3)
    assert journal.names is None
    journal.keep_parts(1)
    journal.add_part(part(5))
    assert [p.name for p in read(tmp_path).parts] == ["block.0", "block.5"] == [p.name for p in journal.parts]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write(tmp_path, 1)
    before = (tmp_path / JOURNAL_NAME).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*the same command goes on"):
            journal.add_part(part(1))
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    journal.add_part(part(1))
    assert read(tmp_path).parts == journal.parts


def test_flatten() -> None:
    nested = {"recipe": {"scheme": {"bits": 3}, "ignore": ["a"], "options": {}}, "threads": 2}
    assert flatten(nested) == {
        "recipe.scheme.bits": 3,
        "recipe.ignore": ["a"],
        "recipe.options": {},
        "threads": 2,
    }


def test_changes_name_old_and_new_value() -> None:
    new = {"recipe.scheme.bits": 4, "model.source": "copy of MODEL", "offload.folder": "x", "seed": 0}
    assert changed_conditions(CONDITIONS, new) == [
        "recipe.scheme.bits was 3 and is now 4",
        "seed was not set and is now 0",
        "threads was 1 and is now not set",
    ]
    assert changed_conditions({"a": [1, 2], "b": {"x": 1, "y": 2}}, {"a": (1, 2), "b": {"y": 2, "x": 1}}) == []


def test_nothing_that_decides_bytes_may_change() -> None:
    assert not {"threads", "processes", "device", "versions", "recipe", "calibration", "model"} & set(MAY_CHANGE)

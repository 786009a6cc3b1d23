"""Files that a run of several passes keeps for itself: whole or not there, gone at the end, checked when read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ptq.checkpoint.workspace import Workspace
from ptq.errors import OutputError

TENSORS = {
    "0|mlp.up_proj:offset": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "codes": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "scale": torch.tensor([1.5], dtype=torch.bfloat16),
    "nothing": torch.empty(0, 4),
}
PAYLOAD = {"records": [{"notes": ["said"], "loss": 1e-300}], "text": "Größe"}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "a" / "work")
    assert work.names() == []
    work.save("state-00-00001", TENSORS, PAYLOAD)
    work.save("init-00000", {}, {})
    found = work.load("state-00-00001")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert work.payload("state-00-00001") == PAYLOAD
    assert (work.load("init-00000"), work.payload("init-00000")) == ({}, {})
    assert work.names() == ["init-00000", "state-00-00001"]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_figures_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, figures: list[float]) -> None:
    work = Workspace(tmp_path_factory.mktemp("work"))
    work.save("state", {}, {"records": figures})
    assert work.payload("state")["records"] == figures


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    work, whole = Workspace(tmp_path), torch.arange(12.0).view(3, 4)
    work.save("state", {"turned": whole.T, "part": whole[:, 1:3]}, {})
    assert torch.equal(work.load("state")["turned"], whole.T)
    assert torch.equal(work.load("state")["part"], whole[:, 1:3])


def test_saving_again_replaces(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    for value in (1.0, 2.0):
        work.save("state", {"a": torch.tensor([value])}, {"n": value})
    assert work.load("state")["a"].item() == 2
    assert work.payload("state") == {"n": 2.0}
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_files_go_one_by_one_and_all_at_the_end(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    for name in "abc":
        work.save(name, TENSORS, {})
    work.drop("b")
    work.drop("b")  # it is gone: nothing to do
    assert work.names() == ["a", "c"]
    work.close()
    assert not (tmp_path / "work").exists()
    assert work.names() == []
    work.close()


def test_a_process_that_does_not_lead_only_reads(tmp_path: Path) -> None:
    lead, other = Workspace(tmp_path / "work"), Workspace(tmp_path / "work", writes=False)
    other.save("mine", TENSORS, {})
    assert not (tmp_path / "work").exists()
    lead.save("state", TENSORS, PAYLOAD)
    assert torch.equal(other.load("state")["codes"], TENSORS["codes"])
    other.drop("state")
    other.close()
    assert other.names() == ["state"]


def test_half_a_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before the rename, the last complete state is still there."""
    work = Workspace(tmp_path)
    work.save("state", {"a": torch.zeros(2)}, {"n": 1})

    def cut(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calib.checkpoint.atomic_files.os.replace", cut)
    with pytest.raises(OutputError, match=r"state\.safetensors: No space left on device.*Free space"):
        work.save("state", {"a": torch.ones(2)}, {"n": 2})
    assert work.payload("state") == {"n": 1}
    assert work.names() == ["state"]
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_what_json_does_not_carry_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        work.save("state", {}, {"loss": float("nan")})
    assert work.names() == []


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no payload", "bad payload", "a bit", "another's"])
def test_a_damaged_file_is_named_with_what_to_do(damage: str, tmp_path: Path) -> None:
    work, path = Workspace(tmp_path), tmp_path / "state.safetensors"
    work.save("state", TENSORS, PAYLOAD)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) - 9])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "a bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "another's":
        work.save("state-00-00001", TENSORS, PAYLOAD)
        path.write_bytes((tmp_path / "state-00-00001.safetensors").read_bytes())
    elif damage == "text":
        path.write_text("This is no tensor. " * 20)
    else:
        save_file(TENSORS, path, metadata=None if damage == "no payload" else {"payload": json.dumps(PAYLOAD)[:-3]})
    with pytest.raises(OutputError, match=r"state\.safetensors is damaged.*--restart"):
        work.payload("state")
    with pytest.raises(OutputError, match=r"state\.safetensors is damaged.*--restart"):
        work.load("state")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"state-00-00007\.safetensors .*No such file"):
        Workspace(tmp_path).load("state-00-00007")

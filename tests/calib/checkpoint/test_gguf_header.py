"""The header of GGUF files: read like the gguf package reads it; damaged ones are refused before anything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from calib.checkpoint.gguf_header import read_gguf_header
from calib.errors import ModelError
from cli.main import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("tiny")
    writer.add_array("llama.list", [1, 2, 3])
    writer.add_token_list([f"t{i}" for i in range(100)])
    writer.add_tensor("a.weight", np.zeros((4, 18 * 2), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("b.weight", np.ones(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_the_header_is_read(file: Path) -> None:
    header = read_gguf_header(file)
    assert header.entries["general.name"] == "tiny"
    assert header.entries["llama.list"] == [1, 2, 3]
    assert header.entries["tokenizer.ggml.tokens"] == 100
    assert [tuple(one) for one in header.tensors] == [("a.weight", (4, 64), "Q4_0", 144), ("b.weight", (7,), "F32", 28)]
    assert header.tensors[0].bits_per_weight == 4.5


def test_it_is_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["general.name"] == "tiny"
    assert data["tensors"][0] == {"name": "a.weight", "type": "Q4_0", "shape": [4, 64], "bytes": 144}
    assert main(["inspect", str(file), "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert "4.500" in shown
    assert "b.weight" not in shown


def test_a_folder_of_another_program_is_shown(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_folder)]) == 0
    shown = capsys.readouterr().out
    assert "model.norm.weight" in shown
    assert "BF16" in shown


@pytest.mark.parametrize("command", ["inspect", "eval"])
def test_every_cut_is_refused(command: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.read_bytes()
    for size in (0, 3, 20, 60, 400, len(whole) - 40):
        file.write_bytes(whole[:size])
        assert main([command, str(file), *(["--text", "pydoc:eval"] if command == "eval" else [])]) == 3
        assert "is not a readable GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize(("at", "claim"), [(8, "tensors"), (16, "entries"), (24, "a text of")])
def test_absurd_lengths_are_refused(at: int, claim: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + 8] = struct.pack("<Q", 2**60)
    file.write_bytes(data)
    with pytest.raises(ModelError, match=f"claims {claim}" if at == 24 else f"claims {2**60} {claim}"):
        read_gguf_header(file)


def test_absurd_shapes_and_unknown_types_are_refused(file: Path) -> None:
    data = file.read_bytes()
    at = data.index(b"a.weight") + 8 + 4
    for value in (2**62, 63):
        file.write_bytes(data[:at] + struct.pack("<Q", value) + data[at + 8 :])
        with pytest.raises(ModelError, match="has the shape"):
            read_gguf_header(file)
    file.write_bytes(data[: at + 16] + struct.pack("<I", 999) + data[at + 20 :])
    with pytest.raises(ModelError, match="unknown type 999"):
        read_gguf_header(file)
    file.write_bytes(b"GGUF" + struct.pack("<I", 9) + data[8:])
    with pytest.raises(ModelError, match="version 9"):
        read_gguf_header(file)

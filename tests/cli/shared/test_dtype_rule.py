"""One rule for the type of activations: a ``.gguf`` file and the folder that is made of it are run in the same."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli.shared import models
from cli.shared.models import load_model, resolved_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "source", "native", "expected"),
    [
        ("auto", "x.gguf", True, "bfloat16"),
        ("auto", "folder", True, "auto"),
        ("auto", "x.gguf", False, "float32"),
        ("auto", "folder", False, "float32"),
        ("float16", "x.gguf", True, "float16"),
        ("bfloat16", "folder", False, "bfloat16"),
    ],
)
def test_what_auto_means(monkeypatch: pytest.MonkeyPatch, asked: str, source: str, native: bool, expected: str) -> None:
    monkeypatch.setattr(models, "has_fast_bfloat16", lambda device: native)
    assert resolved_dtype(asked, CPU, source) == expected


def test_a_gguf_file_is_loaded_in_the_type_of_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def read(folder: Path, **kwargs: Any) -> torch.nn.Module:
        given.update(kwargs)
        return torch.nn.Linear(1, 1)

    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))  # a header, and nothing in it
    monkeypatch.setattr(models, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(models, "check_gguf_model", lambda path: None)
    monkeypatch.setattr(models, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=read))
    monkeypatch.setattr(models, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda folder, **kwargs: None))
    load_model(str(tmp_path / "x.gguf"), device="cpu")
    assert (given["dtype"], given["gguf_file"]) == ("bfloat16", "x.gguf")

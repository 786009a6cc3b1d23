"""Quantized folders and ``.gguf`` files that are damaged or made to do harm: a sentence from every command, no crash.

Sizes in headers are refused before memory is taken for them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from tests.cli.bad_input.commands import Damage, sentence
from tests.support.packed_checkpoints import CASES, write

WEIGHTS = "model.safetensors"
FAILED = (3, 4, 5, 6)


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    out, text = str(folder / "OUT"), folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {
        "inspect": ["inspect", str(model)],
        "eval": ["eval", str(model), "--text", str(text), "--device", "cpu", "--no-card"],
        "export": ["export", str(model), "--format", "bf16", "-o", out],
        "repack": ["export", str(model), "--format", "native", "-o", out],
        "quantize": ["quantize", str(model), "--method", "rtn", "--device", "cpu", "-o", out],
    }


def attack(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *, shown: bool, wanted: str) -> None:
    """Run every command; a command that raises another error than ours ends the test with its traceback."""
    for command, arguments in commands(model, folder).items():
        code = main(arguments)
        if command == "inspect" and shown:  # nothing that it looks at is wrong
            assert code == 0
            capsys.readouterr()
            continue
        line = sentence(capsys)
        assert code in FAILED, (command, line)
        if command != "eval":  # other readers are asked there, in their own order
            assert wanted in line, command
        assert not (folder / "OUT" / "config.json").exists()


def config(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        stored["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(stored))

    return damage


def tensors(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        new = {key: change(value) if key.endswith(f".{role}") else value for key, value in stored.items()}
        save_file(new, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def pattern(text: str) -> dict[str, Any]:
    return {"a": {"targets": [text], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}


def index(name: Any, target: str | None = None) -> Damage:
    """An index whose file has a name of one's choice; ``target`` makes it a link."""

    def damage(folder: Path) -> None:
        keys = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "kept.safetensors")
        if target is not None:
            (folder / name).symlink_to(target)
        text = json.dumps({"weight_map": dict.fromkeys(keys, name)})
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def nan(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, float("nan"))


FOLDERS: dict[str, tuple[str, Damage, str, bool]] = {
    # the folder, what is done to it, the sentence, whether `inspect` shows it all the same
    "meta": ("gptq-4", config(meta="x"), "meta is 'x', not an object", True),
    "float codes": ("gptq-4", tensors("qweight", torch.Tensor.float), "qweight is stored as F32", True),
    "float zeros": ("awq", tensors("qzeros", torch.Tensor.float), "qzeros is stored as F32", True),
    "float order": ("gptq-act-order", tensors("g_idx", torch.Tensor.float), "g_idx is stored as F32", True),
    "integer scales": ("gptq-4", tensors("scales", torch.Tensor.int), "scales is stored as I32", True),
    "scales not finite": ("gptq-4", tensors("scales", nan), "NaN or Inf", True),
    "no codes": ("awq", tensors("qweight", lambda value: value[:0].clone()), "qweight", True),
    "groups of nothing": ("gptq-4", config(group_size=0), "group_size", True),
    "huge groups": ("awq", config(group_size=10**30), "group_size", True),
    "pattern": ("ct-4-sym", config(config_groups=pattern("re:(")), "the pattern 're:('", True),
    "ignored pattern": ("ct-4-sym", config(ignore=["re:["]), "the pattern 're:['", True),
    "transforms": ("ct-4-sym", config(transform_config="x"), "transform_config is 'x', not an object", True),
    "shape of floats": (
        "ct-4-sym",
        tensors("weight_shape", lambda value: torch.tensor([1.5, float("nan")])),
        "weight_shape is stored as F32",
        True,
    ),
    "shape of many": ("ct-4-sym", tensors("weight_shape", lambda value: torch.zeros(9).long()), "weight_shape", True),
    "huge shape": (
        "ct-4-asym",
        tensors("weight_shape", lambda value: torch.tensor([2**62, 2**62])),
        f"{2**62} x {2**62}",
        True,
    ),
    "index above": ("gptq-4", index("../kept.safetensors"), "not a safetensors file in that folder", False),
    "index elsewhere": ("gptq-4", index("/tmp/kept.safetensors"), "not a safetensors file in that folder", False),
    "link to itself": ("awq", index("link.safetensors", "link.safetensors"), "link.safetensors", False),
    "link to a folder": ("awq", index("link.safetensors", "/tmp"), "link.safetensors", False),
    "link to a device": ("awq", index("link.safetensors", "/dev/zero"), "link.safetensors", False),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_quantized_folders(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, damage, wanted, shown = FOLDERS[case]
    stated, _, make = CASES[source]
    model = tmp_path / "MODEL"
    write(model, stated, make)
    damage(model)
    attack(model, tmp_path, capsys, shown=shown, wanted=wanted)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int) -> bytes:
    return struct.pack("<IQ", kind, length)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def gguf(
    entries: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), *, counts: tuple[int, int] | None = None
) -> bytes:
    """A file; ``counts`` are the numbers of tensors and entries that it claims."""
    counts = counts or (len(infos), len(entries))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join((*entries, *infos)) + bytes(4096)


STRING, ARRAY, NUMBER, LLAMA = 8, 9, 4, entry("general.architecture", 8, text("llama"))
GGUF: dict[str, tuple[bytes, str, bool]] = {
    "cut": (gguf((LLAMA,))[:30], "it ends at byte", False),
    "tensors without end": (gguf(counts=(2**60, 0)), f"it claims {2**60} tensors", False),
    "entries without end": (gguf(counts=(0, 2**60)), f"it claims {2**60} entries", False),
    "text without end": (gguf((struct.pack("<Q", 2**62),)), f"it claims a text of {2**62} bytes", False),
    "array without end": (gguf((entry("a", ARRAY, array(NUMBER, 2**50)),)), f"it claims {2**50} elements", False),
    "arrays in arrays": (
        gguf((entry("a", ARRAY, array(ARRAY, 1) * 20_000 + array(NUMBER, 0)),)),
        "arrays in arrays",
        False,
    ),
    "huge tensor": (gguf((LLAMA,), (tensor("x", (2**63,) * 4),)), "has the shape", False),
    "tensor outside": (gguf((LLAMA,), (tensor("x", (8,), 0, 2**63),)), "would end at byte", False),
    "architecture of a number": (
        gguf((entry("general.architecture", NUMBER, bytes(4)),), (tensor("x", (8,)),)),
        "general.architecture '0', not a name",
        True,
    ),
    "model without sizes": (gguf((LLAMA,), (tensor("x", (8,)),)), "and its tensors have 8: entries", True),
    "blocks without end": (
        gguf((LLAMA, entry("llama.block_count", NUMBER, struct.pack("<I", 2**31))), (tensor("x", (8,)),)),
        f"num_hidden_layers is {2**31}",
        True,
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf_files(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, wanted, shown = GGUF[case]
    model = tmp_path / "MODEL.gguf"
    model.write_bytes(content)
    for command, arguments in commands(model, tmp_path).items():
        code = main(arguments)
        if command == "inspect" and shown:
            assert code == 0
            capsys.readouterr()
        elif command == "repack":
            assert code == 2
            assert "is a GGUF file" in sentence(capsys)
        else:
            assert code == 3
            assert wanted in sentence(capsys), command

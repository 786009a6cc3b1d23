"""Damage to a stored window."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evals.texts.kl import TopKLogprobs, keep_top_k

LOADED = {"dtype": "float32", "device": "cpu"}


def kept(vocab: int, top_k: int | None, rows: int = 3, seed: int = 0) -> TopKLogprobs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator)
    logits[0, -1] += 20  # the last id there is, as the likeliest
    return keep_top_k(logits, torch.arange(rows) % vocab, top_k, generator)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    tensors = load_file(path)
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(bytes(255 - byte for byte in content))
    elif how == "no vocabulary":
        save_file(tensors, path)
    elif how == "wrong vocabulary":
        save_file(tensors, path, {"vocab": "many"})
    elif how == "a tensor less":
        del tensors["tail_mass"]
        save_file(tensors, path, {"vocab": "40"})
    elif how == "a tensor more":
        save_file(tensors | {"more": torch.zeros(1)}, path, {"vocab": "40"})
    else:
        path.unlink()

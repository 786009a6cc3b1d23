"""Calls of `ptq eval` that the tests share."""

from __future__ import annotations

from pathlib import Path

from cli.main import main

TEXT = "Once upon a time there was a quick brown fox that jumps over the lazy dog. " * 8
ROWS = [
    {"query": f"Question: what jumps {i}?", "choices": ["the fox", "a dog", f"x{i}"], "gold": i % 3} for i in range(5)
]


def run_eval(folder: Path, text: str, *extra: str) -> int:
    return main(["eval", str(folder), "--text", text, "--seqlen", "32", "--device", "cpu", *extra])

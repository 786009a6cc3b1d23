"""Rows of tasks as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HUB_ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "Why is the sky blue?",
        "choices": {"text": ["paint", "scattering", "water"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man [step] stirs.",
        "ctx_b": "then He",
        "endings": ["waits [title] Long", " sleeps.", "x  y"],
        "label": "2",
    },
    "piqa": {"goal": "boil water", "sol1": "use heat", "sol2": "use ice", "label": 0},
    "winogrande": {
        "sentence": "Ann saw Bea because _ waved at her .",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "2",
    },
    "boolq": {"passage": "Cats sleep.", "question": "do cats sleep", "label": 1},
    "openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "copa": {
        "premise": "The vase fell. ",
        "choice1": "It broke.",
        "choice2": "I sang.",
        "question": "effect",
        "label": 0,
    },
    "lambada_openai": {"text": "She opened the  old door"},
    "mmlu": {
        "question": " What is {choices}? ",
        "choices": ["w", "x", "y", "z"],
        "answer": 3,
        "subject": "high_school_biology",
    },
    "sciq": {
        "support": "\n Stars shine.",
        "question": "What shines?",
        "distractor1": "mud",
        "distractor2": "wood",
        "distractor3": "coal",
        "correct_answer": "stars",
    },
}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"query": f"Question: {i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2, **more} for i in range(count)]

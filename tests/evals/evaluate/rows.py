"""Rows of small tasks, and what a record holds besides times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evals
from evals.record import Record

ROWS = {
    "arc_easy": [
        {
            "query": f"Question: what jumps over {thing}?",
            "choices": ["fox", "the lazy café", thing, "a time"],
            "gold": i,
        }
        for i, thing in enumerate(("dog", "expression", "bits", "model"))
    ],
    "openbookqa": [{"query": "The fox is", "choices": ["quick", "lazy"], "gold": i % 2} for i in range(3)],
    "winogrande": [
        {"context_options": ["Once the fox", "Once the dog"], "continuation": "jumps over.", "gold": 0},
        {"context_options": ["Fox", "Dog"], "continuation": "jumps over the other.", "gold": 1},  # nothing in common
    ],
    "lambada_openai": [{"context": "The quick brown fox jumps over the lazy", "continuation": "dog."}] * 2,
    "mmlu": [
        {"query": f"Why {i}?", "choices": ["a", "b", "c"], "gold": 0, "subject": ("law", "art")[i % 2]}
        for i in range(4)
    ],
}
Make = Callable[..., Any]


def content(record: Record) -> Any:
    """A record without what differs from run to run."""
    found = json.loads(json.dumps(record.to_dict(), allow_nan=False))

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("date", "seconds", "environment")}
        return [strip(part) for part in value] if isinstance(value, list) else value

    return strip(found)


# Against a base


def against(model: Any, base: Any, tokenizer: Any, data: Path, **more: Any) -> Record:
    arguments: dict[str, Any] = {"data": data, "seqlen": 20, "against": base, "cache": data.parent / "cache"}
    return evals.evaluate(model, tokenizer, ["arc_easy", "wikitext2", "lambada_openai"], **arguments | more)

"""Records of evaluations that never happened, with chosen numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.items import Items, item_hash
from evals.record import Divergence, ModelInfo, Record, TaskResult, TextResult

__all__ = ["made_divergence", "made_record", "made_task", "made_text", "recipe"]


def recipe(method: str = "coreq", bits: int = 3, seed: int = 0) -> dict[str, Any]:
    """What `ModelInfo` gets to know of a quantization."""
    return {
        "recipe": {
            "method": method,
            "options": {},
            "scheme": {"name": f"int{bits} sym g64", "bits": bits, "symmetric": True, "group_size": 64},
            "calibration": {"source": "c4", "samples": 8, "seqlen": 32, "seed": seed},
        },
        "calibration": {"source": "c4", "seed": seed, "sequences": 8, "fingerprint": f"of the draw {seed}"},
        "bits_per_weight": bits + 0.25,
    }


def made_record(
    source: str,
    results: Sequence[TextResult | TaskResult],
    *,
    tokenizer: str = "t",
    environment: dict[str, Any] | None = None,
    base: Record | None = None,
    **model: Any,
) -> Record:
    info = {"fingerprint": f"of {source}", "architecture": "Tiny", "parameters": 1000, "bytes": 2000} | model
    return Record(
        date="2026-01-01T00:00:00+00:00",
        model=ModelInfo(source=source, **info),
        tokenizer_hash=tokenizer,
        texts=tuple(result for result in results if isinstance(result, TextResult)),
        tasks=tuple(result for result in results if isinstance(result, TaskResult)),
        harness=None,
        environment={"dtype": "float32", "device": "cpu", "batch_size": 1} | (environment or {}),
        seconds=1.0,
        base=base,
    )


def made_text(
    nll: Sequence[float],
    tokens: Sequence[int] | None = None,
    *,
    name: str = "words",
    first: int = 0,
    convention: str = "segments",
    settings: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    divergence: Divergence | None = None,
) -> TextResult:
    """A text whose item ``i`` has ``nll[i]`` nats over ``tokens[i]`` (10) tokens; ids count from ``first``."""
    counts = np.array([10] * len(nll) if tokens is None else tokens, dtype="<i4")
    values = {"nll": np.array(nll, dtype="<f8"), "tokens": counts}
    values |= {column: np.array(content, dtype="<f8") for column, content in (columns or {}).items()}
    ids = np.array([item_hash([convention, first + i]) for i in range(len(nll))], dtype="<u8")
    size = int(values["bytes"].sum()) if "bytes" in values else None
    return TextResult(
        name=name,
        source=name,
        sha256=f"of {name}",
        convention=convention,
        settings=settings or {"seqlen": 11},
        nll=float(sum(nll)),
        tokens=int(counts.sum()),
        words=None,
        bytes=size,
        items=Items(ids, values),
        divergence=divergence,
    )


def made_divergence(base: str, top_k: int | None = None) -> Divergence:
    names = [field.name for field in dataclasses.fields(Divergence)]
    return Divergence(**dict.fromkeys(names, 0.125) | {"top_k": top_k, "base": base})


def made_task(
    right: Sequence[int],
    *,
    name: str = "quiz",
    first: int = 0,
    margin: Sequence[float] | float = 1.0,
    cluster: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
) -> TaskResult:
    """Questions of three answers; the chosen one leads by ``margin`` nats. ``right[i]`` 1: gold, 0: 2nd, -1: 3rd."""
    n = len(right)
    gold = np.arange(n) % 3
    chosen = np.array([g if r == 1 else (g + (1 if r == 0 else 2)) % 3 for g, r in zip(gold, right, strict=True)])
    ll = np.full((n, 3), -5.0)
    ll[np.arange(n), chosen] += margin
    columns = {
        "gold": gold.astype("<i4"),
        "counts": np.full(n, 3, dtype="<i4"),
        "ll": ll.reshape(-1).astype("<f8"),
        "characters": np.full(3 * n, 4, dtype="<i4"),
        "bytes": np.full(3 * n, 4, dtype="<i4"),
    }
    if cluster is not None:
        columns["cluster"] = np.array(cluster, dtype="<i4")
    ids = np.array([item_hash([name, first + i]) for i in range(n)], dtype="<u8")
    return TaskResult(name, name, settings or {"fewshot": 0}, "acc", 1 / 3, Items(ids, columns))

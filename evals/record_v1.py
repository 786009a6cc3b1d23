"""Records of version 1 (one text in segments, no tasks) as JSON data of today's version.

A segment's hash is made of the text's hash, the tokenizer's, the segment length and its number, so that two old records
of the same protocol can be paired. They cannot be paired with newer records, whose hashes are of the tokens themselves.
What version 1 did not know is ``""`` for fingerprints and names, 0 for sizes and ``None`` for errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from calib.errors import DataError
from evals.items import Items, item_hash

__all__ = ["from_version_1"]

_NOTE = "from a record of version 1: fingerprint, recipe and size of the model are not known"
_KEPT = ("kl_mean", "kl_standard_error", "kl_median", "kl_p99", "kl_p999", "kl_max", "top1_agreement")
_NEWER = ("top1_standard_error", "dp_rms", "dp_mean", "top_k")


def from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data of version 1 -> JSON data of version 2, the base's scores as a record of their own.

    Raises:
        DataError: a field that is missing or of another kind.
    """
    try:
        scores = data["base_perplexity"]
        base = None if scores is None else _record(data, data["base"], scores, None, None)
        found = None if data["divergence"] is None else _divergence(data["divergence"])
        return _record(data, data["model"], data["perplexity"], found, base)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the record of version 1 is damaged: {type(error).__name__}: {error}.") from error


def _record(
    data: Mapping[str, Any],
    model: Any,
    scores: Mapping[str, Any],
    divergence: dict[str, Any] | None,
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "record": "ptq-eval",
        "version": 2,
        "date": str(data["date"]),
        "model": {"source": str(model), "fingerprint": "", "architecture": "", "parameters": 0, "bytes": 0},
        "tokenizer_hash": str(data["tokenizer_hash"]),
        "texts": [_text(data, scores, divergence)],
        "tasks": [],
        "harness": None,
        "environment": dict(data["environment"]) | {"batch_size": data["protocol"]["batch_size"]},
        "seconds": float(data["seconds"]),
        "notes": [_NOTE],
        "base": base,
    }


def _text(data: Mapping[str, Any], scores: Mapping[str, Any], divergence: dict[str, Any] | None) -> dict[str, Any]:
    source, protocol = data["text"], data["protocol"]
    size = scores["bytes"]
    return {
        "name": str(source["source"]),
        "source": str(source["source"]),
        "sha256": str(source["sha256"]),
        "convention": str(protocol["convention"]),
        "settings": {"seqlen": int(scores["seqlen"]), "max_tokens": protocol["max_tokens"]},
        "nll": float(scores["nll"]),
        "tokens": int(scores["tokens"]),
        "words": None,
        "bytes": None if size is None else int(size),
        "items": _segments(data, scores).to_dict(),
        "divergence": divergence,
        "notes": [*source["notes"], *scores["notes"]],
        "seconds": float(data["seconds"]),
    }


def _segments(data: Mapping[str, Any], scores: Mapping[str, Any]) -> Items:
    """The means of version 1 times the tokens of a segment."""
    means = np.array(scores["segment_nll"], dtype="<f8")
    scored = int(scores["seqlen"]) - 1
    if means.ndim != 1 or len(means) != scores["segments"] or len(means) * scored != scores["tokens"]:
        raise ValueError(f"{len(means)} segments of {scored} scored tokens do not make {scores['tokens']} tokens")
    protocol = [data["text"]["sha256"], data["tokenizer_hash"], data["protocol"]["convention"], scores["seqlen"]]
    ids = np.array([item_hash(["version 1", *protocol, index]) for index in range(len(means))], dtype="<u8")
    return Items(ids, {"nll": means * scored, "tokens": np.full(len(means), scored, dtype="<i4")})


def _divergence(found: Mapping[str, Any]) -> dict[str, Any]:
    names = (*_KEPT, "log_ratio", "log_ratio_standard_error")
    figures = {name: None if found[name] is None else float(found[name]) for name in names}
    exact = {"kl_low": figures["kl_mean"], "kl_high": figures["kl_mean"], "kl_draw_error": 0.0}  # full vocabulary
    return figures | exact | dict.fromkeys(_NEWER) | {"base": ""}

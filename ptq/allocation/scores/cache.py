"""Scores on disk: computed once, reused for every other budget, solver or limit.

ROOT/scores/<key>.json     the key hashes everything that decides the values
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.checkpoint.atomic_files import write_json
from ptq.allocation.scores import ScoreValues
from ptq.errors import OutputError

__all__ = ["ScoreCache", "default_cache"]

_LAYOUT = 1


def default_cache() -> Path:
    """``$PTQ_CACHE``, or ``ptq`` in the user's cache folder."""
    chosen = os.environ.get("PTQ_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"


class ScoreCache:
    """One entry of the cache.

    Args:
        root: the cache folder.
        conditions: plain data that decides the values: model, score, candidates, tokens, dtype.
    """

    def __init__(self, root: Path, conditions: Mapping[str, Any]) -> None:
        text = json.dumps({"layout": _LAYOUT, **conditions}, sort_keys=True)
        self._conditions = json.loads(text)
        self.path = root / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self) -> ScoreValues | None:
        """The values; ``None`` where there are none, or what is there is damaged or of other conditions."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["conditions"] != self._conditions:
                return None
            values = data["values"]
            return ScoreValues(
                {name: [float(value) for value in row] for name, row in values["table"].items()},
                {name: float(value) for name, value in values["blocks"].items()},
                tuple(values["notes"]),
                values["details"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, values: ScoreValues) -> str | None:
        """Keep the values; a sentence if that is not possible, which costs only time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"conditions": self._conditions, "values": dataclasses.asdict(values)}, shared=True)
        except (OSError, OutputError) as error:
            return f"the scores are not kept for another budget: {error}"
        return None

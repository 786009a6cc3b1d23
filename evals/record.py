"""The record of an evaluation: what was measured on what, item by item, and everything needed to measure it again.

`Record` is frozen and has a version. `Record.from_dict` reads every version that a release has written; fields that
this release does not know are left out, so that newer records of the same version can be read too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.errors import DataError, OutputError
from evals.items import Items
from evals.tasks.metrics import METRICS
from evals.tasks.result import TaskResult
from evals.texts.result import Divergence, TextResult

__all__ = [
    "RECORD_VERSION",
    "Divergence",
    "ModelInfo",
    "Record",
    "TaskResult",
    "TextResult",
    "read_record",
    "read_task_result",
    "read_text_result",
]

RECORD_VERSION = 2
_LARGEST_FILE = 1 << 30
_DAMAGED = (DataError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
_TEXT_COLUMNS = ("nll", "tokens")
_TASK_COLUMNS = ("gold", "counts", "ll", "characters", "bytes")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Which model was measured.

    Args:
        source: a path, a hub id, or the class of a model in memory.
        fingerprint: sha256 over names, shapes and samples of its tensors.
        architecture: name of its class.
        parameters: number of weights, of the full-precision model where it is packed.
        bytes: of its weight files; of its tensors in memory where it has no files.
        bits_per_weight: of the quantized linears, scales and zero points included; ``None`` if nothing is quantized.
        recipe: what it was quantized by (method, scheme, options), ``None`` if unknown.
        calibration: what it was calibrated on (source, seed, fingerprint), ``None`` if nothing or unknown.
    """

    source: str
    fingerprint: str
    architecture: str
    parameters: int
    bytes: int
    bits_per_weight: float | None = None
    recipe: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One evaluation of one model.

    Args:
        date: UTC, to the second.
        model: what was measured.
        tokenizer_hash: of everything that decides how the tokenizer cuts text.
        texts: results of the texts, in the order of the request.
        tasks: results of the tasks, in the order of the request.
        harness: results of lm-evaluation-harness, as it gives them; ``None`` if it was not asked.
        environment: versions, device, dtype, batch size.
        seconds: of everything but loading.
        notes: what a reader must know.
        base: record of the model that it was measured against, on the same items.
        version: of this layout.
    """

    date: str
    model: ModelInfo
    tokenizer_hash: str
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
    harness: dict[str, Any] | None
    environment: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    base: Record | None = None
    version: int = RECORD_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "record": "ptq-eval",
            "version": self.version,
            "date": self.date,
            "model": dataclasses.asdict(self.model),
            "tokenizer_hash": self.tokenizer_hash,
            "texts": [text.to_dict() for text in self.texts],
            "tasks": [task.to_dict() for task in self.tasks],
            "harness": self.harness,
            "environment": self.environment,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "base": None if self.base is None else self.base.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Read JSON data.

        Raises:
            DataError: not a record, another version, a field that is missing or damaged.
        """
        if not isinstance(data, Mapping) or data.get("record") != "ptq-eval":
            raise DataError('not a record of ptq eval (no field "record": "ptq-eval").')
        version = data.get("version")
        if version != RECORD_VERSION:
            raise DataError(
                f"a record of version {version!r}; this ptq reads version {RECORD_VERSION}: evaluate again, or upgrade "
                "ptq-toolkit."
            )
        try:
            return _record(data)
        except DataError:
            raise
        except _DAMAGED as error:
            raise DataError(f"the record is damaged: {type(error).__name__}: {error}.") from error


def read_record(path: str | Path) -> Record:
    """Read a record from a file.

    Raises:
        DataError: as `Record.from_dict`, or a file that is not JSON.
        OutputError: no such file, or one that cannot be read.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} has {file.stat().st_size:,} bytes: that is no record of ptq eval.")
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        raise OutputError(f"cannot read the record {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a record of ptq eval: not JSON ({error}).") from error
    try:
        return Record.from_dict(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_text_result(data: Mapping[str, Any]) -> TextResult | None:
    """A kept result of a text, or ``None`` if it is damaged."""
    try:
        return _text(data)
    except _DAMAGED:
        return None


def read_task_result(data: Mapping[str, Any]) -> TaskResult | None:
    """A kept result of a task, or ``None`` if it is damaged."""
    try:
        return _task(data)
    except _DAMAGED:
        return None


def _record(data: Mapping[str, Any]) -> Record:
    base = data.get("base")
    return Record(
        date=str(data["date"]),
        model=ModelInfo(**_known(ModelInfo, data["model"])),
        tokenizer_hash=str(data["tokenizer_hash"]),
        texts=tuple(_text(text) for text in data["texts"]),
        tasks=tuple(_task(task) for task in data["tasks"]),
        harness=None if data.get("harness") is None else dict(data["harness"]),
        environment=dict(data["environment"]),
        seconds=float(data["seconds"]),
        notes=tuple(data.get("notes", ())),
        base=None if base is None else Record.from_dict(base),
    )


def _text(data: Mapping[str, Any]) -> TextResult:
    found = data.get("divergence")
    divergence = None if found is None else Divergence(**_known(Divergence, found))
    text: TextResult = _result(TextResult, {**data, "divergence": divergence})
    _require_columns(text.name, text.items, _TEXT_COLUMNS)
    if not bool((text.items["tokens"] > 0).all()) or text.tokens < 1:
        raise DataError(f"{text.name}: an item without scored tokens; the record is damaged. Evaluate again.")
    nll, tokens = float(text.items["nll"].sum()), int(text.items["tokens"].sum())
    if not math.isfinite(nll) or tokens != text.tokens or not math.isclose(nll, text.nll, rel_tol=1e-6):
        raise DataError(
            f"{text.name}: the items do not add up to nll and tokens; the record is damaged. Evaluate again."
        )
    return text


def _task(data: Mapping[str, Any]) -> TaskResult:
    task: TaskResult = _result(TaskResult, data)
    _require_columns(task.name, task.items, _TASK_COLUMNS)
    if task.metric not in METRICS:
        raise DataError(f"{task.name}: unknown metric {task.metric!r}; the record is damaged. Evaluate again.")
    counts, gold = task.items["counts"], task.items["gold"]
    answers = int(counts.sum())
    whole = all(len(task.items[name]) == answers for name in ("ll", "characters", "bytes"))
    if not whole or not bool(((counts > 0) & (gold >= 0) & (gold < counts)).all()):
        raise DataError(f"{task.name}: gold, counts and ll do not fit together; the record is damaged. Evaluate again.")
    return task


def _result(kind: Any, data: Mapping[str, Any]) -> Any:
    known = _known(kind, data)
    return kind(**known | {"items": Items.from_dict(data["items"]), "notes": tuple(data.get("notes", ()))})


def _require_columns(name: str, items: Items, needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in items.columns]
    if missing:
        raise DataError(f"{name} has no column {', '.join(missing)}; the record is damaged. Evaluate again.")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "None": type(None)} | {
    "dict[str, Any]": Mapping
}


def _known(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in JSON data; those of plain types are checked."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in data:
            continue
        value, names = data[field.name], str(field.type).split(" | ")
        plain = [_KINDS[name] for name in names if name in _KINDS]
        if len(plain) == len(names) and not any(isinstance(value, one) for one in plain):
            raise TypeError(f"field {field.name!r} is {type(value).__name__}, not {field.type}")
        found[field.name] = value
    return found

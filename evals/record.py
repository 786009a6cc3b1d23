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

import numpy as np

from calib.errors import DataError, OutputError
from evals.items import Items
from evals.statistics import mean_and_error, neighbours
from evals.tasks.metrics import METRICS, per_item

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


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far predictions moved from the base's, token by token, in nats: KL(base || model).

    Args:
        kl_mean, kl_standard_error: over scored tokens; the error by bootstrap over the text's segments.
        kl_median, kl_p99, kl_p999, kl_max: quantiles over tokens (linear between ranks).
        kl_low, kl_high: the exact mean is between these, whatever was drawn; both are it for the full vocabulary.
        kl_draw_error: standard error that drawing from the base's less likely tokens adds; 0 for the full vocabulary.
        top1_agreement: share of tokens for which both find the same token most probable.
        top1_standard_error: of it, by the same bootstrap.
        dp_rms: root of the mean squared change of the true token's probability.
        dp_mean: its mean change; negative where the model became worse.
        log_ratio, log_ratio_standard_error: ``ln(perplexity / base's)``, paired, by the same bootstrap.
        top_k: likeliest tokens of the base that were kept; ``None`` for all.
        base: fingerprint of the base.
    """

    kl_mean: float
    kl_standard_error: float | None
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    kl_low: float | None
    kl_high: float | None
    kl_draw_error: float
    top1_agreement: float
    top1_standard_error: float | None
    dp_rms: float
    dp_mean: float
    log_ratio: float
    log_ratio_standard_error: float | None
    top_k: int | None
    base: str


@dataclasses.dataclass(frozen=True, eq=False)
class TextResult:
    """Perplexity of a text by one convention.

    Args:
        name: as asked for.
        source: file or data set.
        sha256: of the text.
        convention: ``segments``, ``llamacpp``, ``sliding`` or ``documents`` (docs/evaluation.md).
        settings: ``seqlen`` and whatever else decides what is scored.
        nll: sum of ``-ln p`` over the scored tokens, in nats.
        tokens, words, bytes: what was scored; words and bytes may be unknown.
        items: a segment, chunk, window or document each: ``nll`` (nats), ``tokens``, and where known ``bytes``,
            ``words``; with a base also ``kl`` (sum, nats) and ``same_top`` (count).
        divergence: against the base, if there was one.
        notes: what a reader must know.
        seconds: of scoring.
    """

    name: str
    source: str
    sha256: str
    convention: str
    settings: dict[str, Any]
    nll: float
    tokens: int
    words: int | None
    bytes: int | None
    items: Items
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def mean_nll(self) -> float:
        """Nats a scored token."""
        return self.nll / self.tokens

    @property
    def standard_error(self) -> float | None:
        """Of `mean_nll`, from the items' means weighted by their tokens; ``None`` for one item."""
        return mean_and_error(self.items["nll"], self.items["tokens"], clusters=self.clusters)[1]

    @property
    def clusters(self) -> np.ndarray[Any, Any] | None:
        """Group of each item, where neighbours are no independent draws; documents are."""
        return None if self.convention == "documents" else neighbours(len(self.items))

    @property
    def perplexity(self) -> float | None:
        """``exp(mean_nll)``, per token; ``None`` where that overflows."""
        return _exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; ``None`` where the bytes are unknown."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """``exp`` of nats a byte."""
        return _exp(self.nll / self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """``exp`` of nats a word; only whole documents have words."""
        return _exp(self.nll / self.words) if self.words else None

    def to_dict(self) -> dict[str, Any]:
        """JSON data: the fields and the figures that follow from them."""
        figures = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mean_nll", "standard_error")
        divergence = None if self.divergence is None else dataclasses.asdict(self.divergence)
        return _plain(self) | {"divergence": divergence} | {name: getattr(self, name) for name in figures}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """A zero-shot or few-shot task by log-likelihood.

    Args:
        name: of the task.
        source: file or data set of its rows.
        settings: ``fewshot``, ``prompt`` and whatever else decides what is asked.
        metric: the one that is customary for it.
        chance: its value by guessing; ``None`` where guessing has none.
        items: a row each: ``gold``, ``counts`` (answers), ``ll`` (nats), ``characters`` and ``bytes`` of each answer;
            ``greedy`` (0 or 1) where the continuation is the only answer; ``cluster`` where rows come in groups.
        notes: what a reader must know.
        seconds: of scoring.
    """

    name: str
    source: str
    settings: dict[str, Any]
    metric: str
    chance: float | None
    items: Items
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Name -> ``value`` and ``standard_error``, which counts rows of one cluster as one draw."""
        single = "greedy" in self.items.columns
        names = [name for name in METRICS if not (single and name in ("acc_norm", "acc_bytes"))]
        found = {name: mean_and_error(per_item(self.items, name), clusters=self.clusters) for name in names}
        table = {name: {"value": mean, "standard_error": error} for name, (mean, error) in found.items()}
        if single:  # LAMBADA's perplexity: of the last word, tokens not counted
            mean, error = found["ll_gold"]
            value = _exp(-mean)
            spread = None if error is None or value is None else value * error
            table["perplexity"] = {"value": value, "standard_error": None if spread == math.inf else spread}
        return table

    @property
    def clusters(self) -> np.ndarray[Any, Any] | None:
        """Group of each row, int32 ``[n]``, where rows are not independent draws."""
        return self.items.columns.get("cluster")

    def to_dict(self) -> dict[str, Any]:
        """JSON data: the fields and the figures that follow from them."""
        return _plain(self) | {"rows": len(self.items), "metrics": self.metrics}


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One evaluation of one model.

    Args:
        date: UTC, to the second.
        model: what was measured.
        tokenizer_hash: of everything that decides how the tokenizer cuts text.
        texts, tasks: results, in the order asked for.
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


def _plain(result: TextResult | TaskResult) -> dict[str, Any]:
    """Fields as JSON data, the items last."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    items = fields.pop("items")
    return fields | {"notes": list(result.notes), "items": items.to_dict()}


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 709.0 else None

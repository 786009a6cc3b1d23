"""`Report`: what a quantization did, layer by layer; written as ``ptq_report.json`` beside the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq.errors import OutputError

__all__ = [
    "IMPORTED",
    "REPORT_NAME",
    "REPORT_VERSION",
    "STAGING",
    "KeptTensor",
    "LayerRecord",
    "PartRecord",
    "Report",
    "canonical_json",
    "merge",
]

REPORT_NAME = "ptq_report.json"
STAGING = ".ptq_partial"  # where a run writes until it is finished
REPORT_VERSION = 1
IMPORTED = "imported"
"""The method of what another program quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What happened to one linear; one row of ``ptq_report.json``.

    ``loss_rtn`` and ``loss`` are the layer's relative output error ``||W X - Q X~||^2 / ||W X||^2`` for nearest
    rounding of the original weight on the same kind of scales, and for what was chosen (``None`` without calibration
    data). ``figures`` are the method's own, by name: coreq's ``alpha`` (the mismatch coefficient used) and ``r2`` (the
    fraction of the mismatch's energy that a linear map of the quantized model's inputs explains), the ``damping``, ...
    ``notes`` names every fallback that was taken.
    """

    name: str
    method: str
    scheme: dict[str, Any]
    shape: tuple[int, int]
    bits_per_weight: float
    payload_bytes: int
    seconds: float = 0.0
    loss_rtn: float | None = None
    loss: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        return row | {"shape": list(self.shape), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> LayerRecord:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        return cls(**(dict(row) | {"shape": tuple(row["shape"]), "notes": tuple(row["notes"])}))


@dataclasses.dataclass(frozen=True)
class KeptTensor:
    """Parameters left in full precision: a linear that was ignored, the embedding, the head, fused experts, ..."""

    name: str
    reason: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The record of one run. Everything in it is plain data.

    Args:
        model: ``source``, ``architecture``, ``model_type``, ``parameters``, ``dtype``.
        recipe: `Recipe.to_dict`.
        calibration: `calib.data.tokens.Calibration.describe`, or ``None`` for methods without data.
        container: ``"compressed-tensors"`` or ``"native"``, and ``container_reason`` why.
        layers: one record a quantized linear, in the order they were done.
        kept: what stayed in full precision and why.
        totals: ``quantized_parameters``, ``kept_parameters``, ``payload_bytes``, ``kept_bytes``, ``file_bytes``,
            ``bits_per_weight`` (of the quantized linears), ``seconds``.
        timing: seconds by part of the work (``read``, ``passes``, ``statistics``, ``solve``, ``losses``, ``write``).
        environment: versions, device, dtype of the passes, threads, seed.
        warnings: every fallback and anything the user should know.
        files: ``{"bytes", "sha256"}`` of every weight file by its name.
        windows: of learned methods, one row a stage of a window: ``sweep``, ``window``, ``start``, ``stop``, ``share``,
            ``loss_before``, ``loss_after``, ``steps``, ``seconds``, ``captured``, ``notes``.
        companions: names of the files that went along from the source, relative to the folder.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    container: str
    container_reason: str
    layers: tuple[LayerRecord, ...]
    kept: tuple[KeptTensor, ...]
    totals: dict[str, Any]
    timing: dict[str, float]
    environment: dict[str, Any]
    warnings: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    windows: tuple[dict[str, Any], ...] = ()
    companions: tuple[str, ...] = ()
    version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with ``sha256``: a checksum over all the rest."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["layers"] = [layer.to_dict() for layer in self.layers]
        data["kept"] = [dataclasses.asdict(tensor) for tensor in self.kept]
        data["warnings"] = list(self.warnings)
        data["windows"] = list(self.windows)
        data["companions"] = list(self.companions)
        return data | {"sha256": _checksum(data)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        layers = tuple(LayerRecord.from_dict(row) for row in data["layers"])
        kept = tuple(KeptTensor(**row) for row in data["kept"])
        fields = {key: value for key, value in data.items() if key != "sha256"}
        files = {
            name: {"bytes": int(row["bytes"]), "sha256": str(row["sha256"])} for name, row in data["files"].items()
        }
        changed = {"layers": layers, "kept": kept, "warnings": tuple(data["warnings"]), "files": files}
        changed["windows"] = tuple(data["windows"])
        changed["companions"] = tuple(data["companions"])
        return cls(**(fields | changed))

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read the report in an output folder.

        Raises:
            OutputError: there is none, it is damaged or was changed, or a newer version of the toolkit wrote it.
        """
        path = Path(folder) / REPORT_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if (Path(folder) / STAGING).exists():
                raise OutputError(f"the quantization into {folder} was not finished: run it again.") from error
            raise OutputError(f"{folder} has no {REPORT_NAME}: it was not written by ptq quantize.") from error
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot read {path}: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise OutputError(f"{path} is not a report of ptq: it has no version.")
        if data["version"] > REPORT_VERSION:
            raise OutputError(
                f"{path} has version {data['version']}, this ptq reads up to {REPORT_VERSION}: upgrade ptq-toolkit."
            )
        _refuse_changes(path, data)
        try:
            return cls.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{path} is damaged: {error}") from error


def _checksum(data: dict[str, Any]) -> str:
    """SHA-256 in hex of the canonical JSON of a report without its ``sha256``."""
    return hashlib.sha256(canonical_json({key: value for key, value in data.items() if key != "sha256"})).hexdigest()


def _refuse_changes(path: Path, data: dict[str, Any]) -> None:
    """Raise if a report does not carry its own checksum."""
    try:
        found = _checksum(data)
    except ValueError as error:  # NaN, or a lone surrogate
        raise OutputError(f"{path} is damaged: {error}") from error
    stated = data.get("sha256")
    if stated != found:
        raise OutputError(
            f"{path} was changed after it was written: it states the SHA-256 {stated} and has {found}. Restore the "
            f"file, or quantize again."
        )


def canonical_json(data: Any) -> bytes:
    """Compact JSON with sorted keys in UTF-8.

    Raises:
        TypeError, ValueError: not plain data, or NaN or Infinity in it.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclasses.dataclass(kw_only=True)
class PartRecord:
    """One part of a run.

    Args:
        layers: quantized linears in the order they were done.
        kept: what passes through unchanged, by name; kept_parameters: how many numbers that is.
        warnings: sentences for the user.
        timing: seconds, and flops: floating-point operations, by kind of work; seconds: of the whole part.
        windows: what was learned in windows that its blocks were in, a record a stage (`ptq.learning.training`).
        changed: tensors that are not quantized but no longer the checkpoint's: parameter -> key in the shard.
        reasons: why linears that a scheme was assigned to stay in full precision, as the run has found.
    """

    layers: list[LayerRecord] = dataclasses.field(default_factory=list)
    kept: dict[str, KeptTensor] = dataclasses.field(default_factory=dict)
    kept_parameters: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)
    timing: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    changed: dict[str, str] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def keep(self, name: str, reason: str, numbers: int, size: int) -> None:
        """Note a tensor that stays as it is; tensors under one name are added up."""
        before = self.kept[name].bytes if name in self.kept else 0
        self.kept[name] = KeptTensor(name, reason, before + size)
        self.kept_parameters += numbers

    def payload(self) -> dict[str, Any]:
        """Plain data for the journal."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["layers"] = [layer.to_dict() for layer in self.layers]
        data["kept"] = [dataclasses.asdict(tensor) for tensor in self.kept.values()]
        return data

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> PartRecord:
        """The inverse of `payload`, after a round trip through JSON."""
        layers = [LayerRecord.from_dict(row) for row in payload["layers"]]
        kept = {row["name"]: KeptTensor(**row) for row in payload["kept"]}
        return cls(**(dict(payload) | {"layers": layers, "kept": kept}))


def merge(parts: Iterable[PartRecord]) -> PartRecord:
    """All parts as one."""
    total = PartRecord()
    for part in parts:
        total.layers += part.layers
        total.warnings += part.warnings
        total.kept_parameters += part.kept_parameters
        total.seconds += part.seconds
        total.windows += [row for row in part.windows if row not in total.windows]
        total.changed |= part.changed
        total.reasons |= part.reasons
        for name, tensor in part.kept.items():
            before = total.kept[name].bytes if name in total.kept else 0
            total.kept[name] = dataclasses.replace(tensor, bytes=before + tensor.bytes)
        for mine, theirs in ((total.timing, part.timing), (total.flops, part.flops)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
    return total

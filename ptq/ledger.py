"""What happened to every part of a model: one `PartRecord` a block, one for the rest, and the totals over them.

A part's record travels through the journal, so that the report of a resumed run tells the whole story.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ptq.quantized import LayerRecord
from ptq.report import KeptTensor

__all__ = ["PartRecord", "merge"]


@dataclasses.dataclass
class PartRecord:
    """One part of a run.

    Args:
        layers: quantized linears in the order they were done.
        kept: what passes through unchanged, by name; kept_parameters: how many numbers that is.
        warnings: sentences for the user.
        timing: seconds, and flops: floating-point operations, by kind of work; seconds: of the whole part.
        format, format_reason: in which it was written; a resumed run goes on in the same.
        windows: what was learned in windows that its blocks were in, a record a stage (`ptq.learning.training`).
        changed: tensors that are not quantized but no longer the checkpoint's: parameter -> key in the shard.
    """

    layers: list[LayerRecord] = dataclasses.field(default_factory=list)
    kept: dict[str, KeptTensor] = dataclasses.field(default_factory=dict)
    kept_parameters: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)
    timing: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    format: str = ""
    format_reason: str = ""
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    changed: dict[str, str] = dataclasses.field(default_factory=dict)

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
        for name, tensor in part.kept.items():
            before = total.kept[name].bytes if name in total.kept else 0
            total.kept[name] = dataclasses.replace(tensor, bytes=before + tensor.bytes)
        for mine, theirs in ((total.timing, part.timing), (total.flops, part.flops)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + value
    return total

"""`write_gguf`: a result as one GGUF file, one of its weight files in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from torch import Tensor

from calib.checkpoint.atomic_files import file_sha256, write_file
from calib.checkpoint.reader import unmerged_experts
from ptq.errors import OutputError, UsageError
from ptq.export.gguf.experts import Stacks, expert_count, one_kind, stack_of
from ptq.export.gguf.metadata import FAMILIES, Family, add_architecture, find_family, rope_factors
from ptq.export.gguf.types import exact_type, pack_q8_0, row_bytes, tensor_scale, weight_bytes
from ptq.export.gguf.vocabulary import add_vocabulary
from ptq.export.result import Part, Result
from ptq.number_formats.gguf.k_quants import Q6_K
from ptq.pipeline.events import Event, Listener
from ptq.report import Report
from ptq.scheme import Scheme

__all__ = ["EMBEDDING_TYPES", "write_gguf"]

EMBEDDING_TYPES = ("auto", "q6_k", "q8_0", "keep")
"""How the embedding and the head are stored: ``auto`` is Q6_K where the width allows it, as llama.cpp has it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Args:
        name: in the file.
        key: the tensor's, or the quantized linear's, name in the result.
        kind: its type.
        rows: how many, ``None`` for a vector.
        width: numbers per row.
        experts: how many matrices of this size lie in it, ``None`` for a single one.
    """

    name: str
    key: str
    kind: GGMLQuantizationType
    rows: int | None
    width: int
    experts: int | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], row_bytes(self.kind, self.width))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size in (self.experts, self.rows, self.width) if size is not None)


class GgufExport:
    """Everything that is settled before the first weight is read.

    Args:
        result: the quantized model.
        embedding: one of `EMBEDDING_TYPES`.

    Raises:
        UsageError: a family, tokenizer or scheme that a GGUF file cannot hold.
    """

    def __init__(self, result: Result, embedding: str) -> None:
        self._result, self._embedding = result, embedding
        self.config: Any = result.skeleton.config
        self.family: Family = find_family(str(self.config.model_type), dense=unmerged_experts(result.skeleton) is None)
        self._names = get_tensor_name_map(self.family.arch, self.config.num_hidden_layers)
        self._expert_count = expert_count(self.config)
        stacks = Stacks(self._expert_count)
        self.entries = {path.name: list(self._entries_of(path, stacks)) for path in result.files}
        stacks.check_complete()
        self._stacks = Stacks(self._expert_count)

    def notes(self) -> list[str]:
        """What llama.cpp does not do, one sentence each."""
        found = []
        if any(scheme.rounds_input for scheme in self._result.schemes.values()):
            found.append(
                "the inputs of linears are not rounded as the result has it: llama.cpp rounds them its own way"
            )
        if self._result.key_values is not None:
            found.append("keys and values are not rounded as the result has it: llama.cpp has --cache-type-k and -v")
        return found

    def _entries_of(self, path: Path, stacks: Stacks) -> Iterator[Entry]:
        """Tensors that one weight file becomes, in the order of `arrays`: experts where the last of a stack comes."""
        rows = self._result.rows
        names, others = self._result.contents(path)
        for name in names:
            shape, scheme = rows[name].shape, self._result.schemes[name]
            kind = self._exact_type(name, scheme, shape)
            key, kinds = name, [kind]
            stacked = stack_of(name)
            if stacked is not None:
                key, found = stacked[0], stacks.add(*stacked, kind)
                if found is None:
                    continue
                kinds = found
            experts = None if stacked is None else len(kinds)
            tensor = self._name(f"{key}.weight")
            yield Entry(tensor, key, one_kind(key, kinds), shape[0], shape[1], experts)
            if kind == GGMLQuantizationType.NVFP4:
                yield Entry(_scale_name(tensor), key, GGMLQuantizationType.F32, None, experts or 1)
        for key, one in others.items():
            if stack_of(key) is not None:
                raise UsageError(f"{key} is in full precision: a GGUF file has all experts of a layer in one type.")
            kind = self._plain_kind(key, one.shape, one.dtype)
            matrix = len(one.shape) == 2 and one.shape[0] > 1  # the gate of a shared expert is a vector there
            yield Entry(self._name(key), key, kind, one.shape[0] if matrix else None, one.shape[-1])

    def _exact_type(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> GGMLQuantizationType:
        kind = exact_type(name, scheme, shape)
        if kind == GGMLQuantizationType.NVFP4 and not self.family.tensor_scales:
            able = ", ".join(name for name, family in FAMILIES.items() if family.tensor_scales)
            raise UsageError(
                f"{name} is nvfp4, whose scale of the tensor llama.cpp applies to all linears only in {able}: quantize "
                "again with --format mxfp4 or q4_k, or write a dequantized folder (--format f16)."
            )
        return kind

    def _name(self, key: str) -> str:
        found = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"llama.cpp's {MODEL_ARCH_NAMES[self.family.arch]} has no tensor for {key}.")
        return str(found)

    def _plain_kind(self, key: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
        if len(shape) == 1 or "ffn_gate_inp" in self._name(key):  # routers
            return GGMLQuantizationType.F32
        if len(shape) != 2:
            raise UsageError(f"{key} has {len(shape)} dimensions, and ptq writes matrices and vectors to GGUF.")
        if self._is_embedding(key) and self._embedding != "keep":
            wide = shape[1] % 256 == 0 and self._embedding != "q8_0"
            if self._embedding == "q6_k" and not wide:
                raise UsageError(f"{key} is {shape[1]} wide, and q6_k takes multiples of 256: --embedding q8_0.")
            if wide or shape[1] % 32 == 0:
                return GGMLQuantizationType.Q6_K if wide else GGMLQuantizationType.Q8_0
        return {"BF16": GGMLQuantizationType.BF16, "F16": GGMLQuantizationType.F16}.get(dtype, GGMLQuantizationType.F32)

    def _is_embedding(self, key: str) -> bool:
        model = self._result.skeleton
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        owner = model.get_submodule(key.rpartition(".")[0])
        return any(owner is module for module in modules)

    def add_tensors(self, writer: GGUFWriter) -> None:
        """Describe all tensors."""
        factors = rope_factors(self.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), 4 * len(factors))
        for entries in self.entries.values():
            for one in entries:
                size = int(np.prod(one.byte_shape))
                if one.kind == GGMLQuantizationType.F32:
                    writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), size)
                else:
                    writer.add_tensor_info(one.name, one.byte_shape, np.dtype(np.uint8), size, one.kind)

    def arrays(self, part: Part) -> Iterator[tuple[Entry, Any]]:
        """Entries of one weight file with their content."""
        entries = iter(self.entries[f"{part.name}.safetensors"])
        for name, weight in part.linears():
            kind = exact_type(name, weight.scheme, weight.shape)
            content, scale = self._rows(name, weight_bytes(name, weight, kind)), tensor_scale(weight)
            stacked = stack_of(name)
            if stacked is not None:
                found = self._stacks.add(*stacked, (content, scale))
                if found is None:
                    continue
                content = torch.stack([bytes_ for bytes_, _ in found])
                scale = None if scale is None else torch.cat([one for _, one in found])
            yield next(entries), content.numpy()
            if scale is not None:
                yield next(entries), scale.numpy()
        for entry in entries:
            yield entry, _array(self._rows(entry.key, self._shifted(entry, part.others[entry.key])), entry.kind)

    def _rows(self, key: str, tensor: Tensor) -> Tensor:
        """Rows of q and k in llama.cpp's order: halves of a head's channels turn into pairs."""
        leaf = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if not self.family.permutes or leaf not in ("q_proj", "k_proj"):
            return tensor
        heads = self.config.num_attention_heads if leaf == "q_proj" else self.config.num_key_value_heads
        paired = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2)
        return paired.reshape(tensor.shape).contiguous()

    def _shifted(self, entry: Entry, tensor: Tensor) -> Tensor:
        adds = self.family.adds_one and entry.key.endswith("norm.weight")
        return tensor.float() + 1.0 if adds else tensor


def _scale_name(tensor: str) -> str:
    return f"{tensor.removesuffix('.weight')}.scale"


def _array(tensor: Tensor, kind: GGMLQuantizationType) -> Any:
    """The content of a tensor that was not quantized."""
    if kind == GGMLQuantizationType.F32:
        return tensor.float().numpy()
    if kind == GGMLQuantizationType.Q8_0:
        return pack_q8_0(tensor).numpy()
    if kind == GGMLQuantizationType.Q6_K:
        parts = []
        for rows in torch.split(tensor, 4096):
            scheme, target = Scheme.of("q6_k"), rows.float()
            grid = Q6_K.grid(Q6_K.fit(target, scheme), scheme, target.shape[1])
            parts.append(Q6_K.pack(grid.round(target), grid.params, scheme)["weight_packed"])
        return torch.cat(parts).numpy()
    return tensor.contiguous().view(torch.uint8).numpy()


def write_gguf(result: Result, out: Path, listener: Listener, *, embedding: str = "auto") -> Report:
    """Write the file; after a crash it is either as it was or complete.

    Args:
        result: the quantized model.
        out: the file.
        listener: called at every step.
        embedding: one of `EMBEDDING_TYPES`.

    Raises:
        UsageError: what a GGUF file cannot hold.
        OutputError: the file cannot be written.
    """
    start = time.monotonic()
    plan = GgufExport(result, embedding)
    for note in plan.notes():
        listener(Event("message", note))
    listener(Event("blocks", text="weight files", total=len(plan.entries)))

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, MODEL_ARCH_NAMES[plan.family.arch])
        try:
            _write(writer, temporary, result, plan, listener)
        finally:
            writer.close()

    write_file(out, write)
    old = result.report
    size = out.stat().st_size
    return dataclasses.replace(
        old,
        container="gguf",
        container_reason=f"exported from {result.folder} ({old.container})",
        totals={**old.totals, "file_bytes": size},
        environment={**old.environment, "export_seconds": time.monotonic() - start},
        warnings=(*old.warnings, *plan.notes()),
        files={out.name: {"bytes": size, "sha256": file_sha256(out)}},
        companions=(),
    )


def _write(writer: GGUFWriter, path: Path, result: Result, plan: GgufExport, listener: Listener) -> None:
    _add_general(writer, result)
    add_architecture(writer, plan.config, plan.family)
    add_vocabulary(writer, result.folder, int(plan.config.vocab_size))
    plan.add_tensors(writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    factors = rope_factors(plan.config)
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for number, part in enumerate(result.parts(), start=1):
        for entry, content in plan.arrays(part):
            size = int(np.prod(entry.byte_shape))
            if content.nbytes != size:
                raise OutputError(f"{entry.key} has {content.nbytes} bytes as {entry.kind.name}, {size} were planned.")
            writer.write_tensor_data(content)
        listener(Event("block_done", name=part.name, done=number, total=len(plan.entries)))


def _add_general(writer: GGUFWriter, result: Result) -> None:
    """Name, and what was done: the recipe and the fingerprint of the calibration text, as JSON."""
    report = result.report
    writer.add_type("model")
    writer.add_name(Path(str(report.model["source"])).name)
    writer.add_quantization_version(2)
    record = {
        "recipe": report.recipe,
        "calibration": report.calibration,
        "model": report.model,
        "bits_per_weight": report.totals["bits_per_weight"],
    }
    writer.add_string("ptq.report", json.dumps(record, ensure_ascii=False))

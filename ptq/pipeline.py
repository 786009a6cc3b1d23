"""One run: walk through the model, quantize every linear of the plan, write blocks as they are finished."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib.checkpoint_reader import ModelSource
from calib.model_map import fused_experts, is_linear
from calib.precision import strict_float32
from calib.stats import TWO_STREAMS, GroupStatistics
from calib.text import Calibration
from calib.walk import BlockVisit, GroupVisit, Timing, Walk
from ptq.errors import NumericalError, PtqError
from ptq.events import Event, Listener
from ptq.formats import compressed_tensors, native
from ptq.formats.select import select_format
from ptq.formats.writer import CheckpointWriter
from ptq.losses import layer_losses
from ptq.methods import LayerMethod
from ptq.plan import Plan
from ptq.quantized import LayerRecord
from ptq.recipe import Recipe
from ptq.report import KeptTensor, Report
from ptq.scheme import Scheme

__all__ = ["Run"]

_FORMATS = {"compressed-tensors": compressed_tensors, "native": native}
_VERSIONS = ("ptq-toolkit", "torch", "transformers", "compressed-tensors", "safetensors")


class Run:
    """Everything that one quantization needs, put together by `ptq.api.quantize`.

    Args:
        source: the model; plan: what to do to its linears; recipe: for the record.
        method: the method; config: its options.
        calibration: tokens, or ``None`` for a method that needs none.
        out: the output folder.
        device: where to work; dtype: of the passes.
        listener: told of every step.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        recipe: Recipe,
        method: LayerMethod,
        config: Any,
        calibration: Calibration | None,
        out: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        listener: Listener,
    ) -> None:
        self.source, self.plan, self.recipe, self.method, self.config = source, plan, recipe, method, config
        self.calibration, self.device, self.dtype, self.tell = calibration, device, dtype, listener
        self.needs = method.needs(config)
        self.timing = Timing()
        self._experts = frozenset(fused_experts(source.skeleton))
        self.linears = {name: module for name, module in source.skeleton.named_modules() if is_linear(module)}
        self.format, self.format_reason = select_format(recipe.format, plan.schemes, self.linears, source.skeleton)
        self.writer = CheckpointWriter(out)
        self._records: list[LayerRecord] = []
        self._kept: dict[str, KeptTensor] = {}
        self._kept_parameters = 0
        self._warnings: list[str] = []

    def execute(self, tokenizer: PreTrainedTokenizerBase | None) -> Report:
        """Quantize and write; returns the report that was written.

        Raises:
            PtqError: see the tree in `ptq.errors`; what an earlier run wrote to the folder is still there.
        """
        with torch.no_grad(), strict_float32(), self.writer:
            return self._execute(tokenizer)

    def _execute(self, tokenizer: PreTrainedTokenizerBase | None) -> Report:
        start = time.perf_counter()
        self.tell(Event("message", f"format {self.format}: {self.format_reason}"))
        tokens = None if self.calibration is None else self.calibration.tokens
        two = bool(self.needs & TWO_STREAMS)
        walk = Walk(self.source, tokens, device=self.device, dtype=self.dtype, two_streams=two, timing=self.timing)
        total = len(walk.block_names)
        self.tell(Event("blocks", total=total))
        for visit in walk:
            tensors = self._quantize_block(visit)
            with self.timing.part("write", self.device):
                done = {f"{visit.name}.{name}.weight" for name in self._done_in(visit)}
                tensors.update(self._passing(walk.tensors_of_block(visit.name) - done))
                self.writer.write_shard(tensors)
            self.tell(Event("block_done", name=visit.name, done=visit.index + 1, total=total))
        with self.timing.part("write", self.device):
            self._write_rest(walk)
            self._write_companions(tokenizer)
            report = self._report(time.perf_counter() - start)
            schemes: dict[str, Scheme | None] = {r.name: self.plan.schemes[r.name] for r in self._records}
            quantization = _FORMATS[self.format].quantization_config(schemes, self.linears)
            self.writer.finish(self._model_config(), quantization, report)
        return report

    # -- one block ---------------------------------------------------------------------------------------------------

    def _quantize_block(self, visit: BlockVisit) -> dict[str, Tensor]:
        schemes = self.plan.in_block(visit.name)
        tensors: dict[str, Tensor] = {}
        for group in visit.groups(self.needs, frozenset(schemes)):
            self.tell(Event("layer", name=group.full_name(group.names[0])))
            stats = group.statistics()
            for name in group.names:
                tensors.update(self._quantize_linear(group, name, schemes[name], stats))
        for name in sorted(schemes.keys() - self._done_in(visit)):
            full = f"{visit.name}.{name}"
            self.plan.reasons[full] = "never called: no token reached it, or the model reads its weight directly"
            self._warn(f"{full} stays in full precision, {self.plan.reasons[full]}")
        return tensors

    def _done_in(self, visit: BlockVisit) -> frozenset[str]:
        prefix = f"{visit.name}."
        return frozenset(r.name.removeprefix(prefix) for r in self._records if r.name.startswith(prefix))

    def _quantize_linear(
        self, group: GroupVisit, name: str, scheme: Scheme, stats: GroupStatistics | None
    ) -> dict[str, Tensor]:
        start, full = time.perf_counter(), group.full_name(name)
        weight = group.weight(name)
        own = None if stats is None else stats.of(name)
        with self.timing.part("solve", self.device):
            try:
                result = self.method.quantize(weight, own, scheme, self.config)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise NumericalError(f"{full}: {error}") from error
            except PtqError as error:
                raise error if full in str(error) else type(error)(f"{full}: {error}") from error
            group.replace(name, result.weight.dequantize(self.dtype))
        with self.timing.part("losses", self.device):
            nearest, loss = layer_losses(weight, result.weight, own)
        for note in result.notes:
            self._warn(f"{full}: {note}")
        record = LayerRecord(
            full,
            self.method.name,
            scheme.to_dict(),
            result.weight.shape,
            result.weight.bits_per_weight,
            result.weight.payload_bytes,
            time.perf_counter() - start,
            nearest,
            loss,
            result.alpha,
            result.r2,
            result.damping,
            None if stats is None else stats.tokens,
            result.notes,
        )
        self._records.append(record)
        self.tell(Event("layer_done", name=full, record=record))
        tensors: dict[str, Tensor] = _FORMATS[self.format].layer_tensors(full, result.weight.to("cpu"))
        return tensors

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        self.tell(Event("message", text))

    # -- what passes through -----------------------------------------------------------------------------------------

    def _passing(self, names: frozenset[str]) -> dict[str, Tensor]:
        """Tensors that are not quantized, unchanged, and noted as kept."""
        tensors = {}
        for key, parameter, tensor in self.source.raw_tensors(names):
            tensors[key] = tensor
            self._keep(parameter, tensor)
        return tensors

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._kept_parameters += tensor.numel()
        module = name.rpartition(".")[0]
        reason = self.plan.reasons.get(module)
        if reason is None and tensor.ndim < 2:
            name, reason = "norms, biases and other vectors", "small"
        elif reason is None:
            reason = self._reason(name)
        before = self._kept[name].bytes if name in self._kept else 0
        self._kept[name] = KeptTensor(name, reason, before + tensor.nbytes)

    def _reason(self, parameter: str) -> str:
        model = self.source.skeleton
        module = model.get_submodule(parameter.rpartition(".")[0])
        if module is model.get_output_embeddings():  # type: ignore[no-untyped-call]
            return "the head"
        if module is model.get_input_embeddings():
            return "the embedding"
        if parameter in self._experts:
            return "fused experts: not quantized by this version"
        return "no linear of a block"

    def _write_rest(self, walk: Walk) -> None:
        rest = self._passing(walk.tensors_outside_blocks())
        if rest:
            self.writer.write_shard(rest)
        experts = sum(k.bytes for k in self._kept.values() if k.reason.startswith("fused experts"))
        if experts:
            share = experts / (experts + sum(r.payload_bytes for r in self._records))
            self._warn(f"experts fused in one tensor stay in full precision: {share:.0%} of the blocks' bytes")

    def _write_companions(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if self.source.folder is not None:
            self.writer.copy_companions(self.source.folder)
            return
        if tokenizer is not None:
            tokenizer.save_pretrained(self.writer.staging)
        generation = getattr(self.source.skeleton, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(self.writer.staging)

    def _model_config(self) -> dict[str, Any]:
        model = self.source.skeleton
        if self.source.folder is not None:
            config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        else:
            config = json.loads(model.config.to_json_string())
        return {**config, "architectures": config.get("architectures") or [type(model).__name__]}

    # -- the report --------------------------------------------------------------------------------------------------

    def _report(self, seconds: float) -> Report:
        model = self.source.skeleton
        quantized = sum(r.shape[0] * r.shape[1] for r in self._records)
        payload = sum(r.payload_bytes for r in self._records)
        kept = tuple(sorted(self._kept.values(), key=lambda tensor: -tensor.bytes))
        totals = {
            "quantized_parameters": quantized,
            "kept_parameters": self._kept_parameters,
            "payload_bytes": payload,
            "kept_bytes": sum(tensor.bytes for tensor in kept),
            "file_bytes": self.writer.weight_bytes,
            "source_bytes": (quantized + self._kept_parameters) * self.source.dtype.itemsize,
            "bits_per_weight": 8 * payload / quantized,
            "seconds": seconds,
        }
        description = {
            "source": self.source.name,
            "architecture": type(model).__name__,
            "model_type": model.config.model_type,
            "parameters": quantized + self._kept_parameters,
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "fingerprint": self.source.fingerprint(),
        }
        return Report(
            description,
            self.recipe.to_dict(),
            None if self.calibration is None else self.calibration.describe(),
            self.format,
            self.format_reason,
            tuple(self._records),
            kept,
            totals,
            dict(self.timing),
            self._environment(),
            tuple(self._warnings),
        )

    def _environment(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        return {
            "versions": {name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
            "device": str(self.device),
            "device_name": device or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "pass_dtype": str(self.dtype).removeprefix("torch."),
            "method_config": {k: getattr(self.config, k) for k in type(self.config).__dataclass_fields__},
        }

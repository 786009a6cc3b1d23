"""One run: walk through the model, quantize every linear of the plan, write blocks as they are finished.

Of several processes the first one writes and reports; the others only compute. What an interrupted run finished is not
done again: its blocks are read back and the streams of activations go through them, which gives the bits that the first
run had.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from calib.checkpoint.reader import ModelSource
from calib.data.tokens import Calibration
from calib.distributed import SINGLE_PROCESS, Workers
from calib.model.structure import all_linears, fused_experts, is_linear
from calib.precision import strict_float32
from calib.runner.activation_store import Offload, OffloadTarget
from calib.runner.forward import check_weight
from calib.runner.runner import BlockContext, CalibrationRunner, Timing
from calib.stats import TWO_STREAMS
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.checkpoint.journal import FinishedPart, Journal, changed_conditions, flatten
from ptq.checkpoint.workspace import WORK
from ptq.checkpoint.writer import STAGING, CheckpointWriter, read_shard
from ptq.containers.base import Container
from ptq.containers.select import CONTAINERS
from ptq.errors import ModelError, UsageError
from ptq.learning import LearnedConfig
from ptq.methods import LayerMethod, WindowMethod, find_method, make_config
from ptq.pipeline.events import Event, Listener
from ptq.pipeline.input_ranges import fit_static_inputs
from ptq.pipeline.input_transforms import input_params, transform_block_inputs
from ptq.pipeline.layerwise import solve_group
from ptq.pipeline.preparation.finished import finished_obstacles
from ptq.pipeline.preparation.preflight import (
    check_disk,
    choose_offload_target,
    clashing_schemes,
    cpu_name,
    peak_memory,
    stream_bytes,
)
from ptq.pipeline.preparation.scheme_assignment import Plan, is_router
from ptq.pipeline.preparation.sizes import FUSED_EXPERTS, NOT_IN_MODEL, Sizes, dense_experts, plan_sizes
from ptq.pipeline.unquantized import carried_parts, outside_parts, read_tensors
from ptq.pipeline.windowed import WindowRun
from ptq.proof import FormatChoice
from ptq.quantized import QuantizedWeight
from ptq.recipe import Recipe
from ptq.report import PartRecord, Report, merge
from ptq.runtime.kv_cache import supports_key_values
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["Run"]

_VERSIONS = ("ptq-toolkit", "torch", "transformers", "compressed-tensors", "safetensors")
_MANY_IDLE = 4  # one window in so many


class Run:
    """Everything that one quantization needs, put together by `ptq.api`.

    Args:
        source: the model; plan: what to do to its linears; recipe: for the record.
        method: the method; config: its options.
        calibration: tokens, or ``None`` for a method that needs none.
        out: the output folder.
        choice: its format.
        device: where to work; dtype: of the passes.
        listener: called with every event.
        offload: where activations are kept.
        restart: do not go on from an interrupted run.
        workers: the processes of this run.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        recipe: Recipe,
        method: LayerMethod | WindowMethod,
        config: Any,
        calibration: Calibration | None,
        out: Path,
        choice: FormatChoice,
        *,
        device: torch.device,
        dtype: torch.dtype,
        listener: Listener,
        offload: Offload = "auto",
        restart: bool = False,
        workers: Workers = SINGLE_PROCESS,
    ) -> None:
        self.source, self.plan, self.recipe, self.method, self.config = source, plan, recipe, method, config
        self.calibration, self.device, self.dtype, self.emit = calibration, device, dtype, listener
        self.out, self.restart, self.workers = out, restart, workers
        self.layer_method, self.layer_config = _layer_method(method, config)
        self.needs = self.layer_method.needs(self.layer_config) if self.layer_method else frozenset()
        self.two_streams = isinstance(method, WindowMethod) or bool(self.needs & TWO_STREAMS)
        bits = recipe.kv_bits
        self.key_values = None if bits is None else KeyValueScheme(bits, recipe.kv_symmetric)
        self.timing, self.flops = Timing(), Timing()
        self._kinds_checked: set[object] = set()
        self._key_values_reached = False
        self._kernels_checked: frozenset[tuple[str, ...]] = frozenset()
        self._started, self._earlier, self._noted = 0.0, PartRecord(), PartRecord()
        blocks = tuple(f"{block}." for block in plan.blocks)
        self._experts = frozenset(name for name in fused_experts(source.skeleton) if name.startswith(blocks))
        self.linears = all_linears(source.skeleton)
        self.choice, self.container, self.container_reason = choice, choice.name, choice.reason
        tokens = None if calibration is None else calibration.tokens
        self._streams = 3 if isinstance(method, WindowMethod) else 2
        self.offload: OffloadTarget = choose_offload_target(
            offload, source.skeleton, tokens, dtype, device, workers.size, self._streams
        )

    @cached_property
    def _fingerprint(self) -> str:
        """Of the model: a condition of the journal and a line of the report, read once."""
        return self.source.fingerprint()

    @property
    def _activations(self) -> Path:
        return self.out / STAGING / "activations"

    def _activation_bytes(self) -> int:
        """Bytes of activations in the output folder while the run is under way."""
        if self.offload != "disk" or self.calibration is None:
            return 0
        return stream_bytes(self.source.skeleton, self.calibration.tokens.numel(), self.dtype, self._streams)

    def _work_bytes(self) -> int:
        """Bytes of what a learned method keeps in the output folder while the run is under way, about."""
        if not isinstance(self.config, LearnedConfig):
            return 0
        sizes, blocks = self.sizes(), len(self.plan.blocks)
        window = max(len(one) for one in self.config.windows(blocks))
        share = 1.0 if len(self.config.sweeps) > 1 else min(1.0, 2 * window / blocks)  # the old state and the new one
        learned = 4 * sizes.quantized * share if self.config.rounding != "nearest" else 0
        return int(learned) + (sizes.packed if self.config.init != "none" else 0)

    def _extra_bytes(self) -> int:
        return self._activation_bytes() + self._work_bytes()

    def sizes(self) -> Sizes:
        """What the output will weigh."""
        return plan_sizes(self.source, self.plan, self.label)

    def make_runner(
        self, *, tokens: Tensor | None = None, batch: int | None = None, folder: Path | None = None
    ) -> CalibrationRunner:
        """A calibration runner over the model with this run's streams.

        Args:
            tokens: a part of the calibration tokens, all of them by default; batch: sequences in a batch.
            folder: for activations on disk, by default in the output folder.
        """
        if tokens is None and self.calibration is not None:
            tokens = self.calibration.tokens
        return CalibrationRunner(
            self.source,
            tokens,
            device=self.device,
            dtype=self.dtype,
            two_streams=self.two_streams,
            timing=self.timing,
            flops=self.flops,
            offload=self.offload,
            folder=folder or self._activations,
            workers=self.workers,
            batch=batch,
        )

    def execute(self, tokenizer: PreTrainedTokenizerBase | None) -> Report:
        """Quantize and write; returns the report that was written, on every process.

        Raises:
            PtqError: see the tree in `ptq.errors`; what an earlier run wrote to the folder is still there.
        """
        self._started = time.perf_counter()
        with torch.no_grad(), strict_float32():
            if not self.workers.is_main_process:
                self._blocks(None)
                return Report.from_dict(self.workers.broadcast_object({}))
            with CheckpointWriter(self.out, self.conditions(), self.restart) as writer:
                parts = self._blocks(writer)
                report = self._finish(writer, parts, tokenizer)
            self.workers.broadcast_object(json.loads(report.to_json()))
            return report

    def conditions(self) -> dict[str, Any]:
        """Everything that decides the bytes: a run is only resumed under the same."""
        environment = self._environment()
        names = ("versions", "device", "device_name", "threads", "processes", "pass_dtype")
        return flatten(
            {
                "recipe": self.recipe.to_dict(),
                "model": {"source": self.source.name, "fingerprint": self._fingerprint},
                "calibration": None if self.calibration is None else self.calibration.fingerprint,
                "offload": self.offload,
                **{name: environment[name] for name in names},
            }
        )

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _blocks(self, writer: CheckpointWriter | None) -> list[PartRecord]:
        """CalibrationRunner through all blocks; the first process writes them and keeps their records."""
        if writer is not None:
            shutil.rmtree(self._activations, ignore_errors=True)  # of a run that was killed
            check_disk(self.out, self.sizes().file_bytes - writer.weight_bytes + self._extra_bytes())
            for note in writer.notes:
                self.emit(Event("message", note))
        finished = self.workers.broadcast_object(
            {} if writer is None else {part.name: part for part in writer.finished}
        )
        runner = self.make_runner()
        total = len(runner.block_names)
        done = sum(name in finished for name in runner.block_names)
        if done:
            how = "activations pass through them again" if runner.has_tokens and done < total else "they are kept"
            self.emit(Event("message", f"going on after {done} of {total} blocks that are finished: {how}"))
        if not isinstance(self.method, WindowMethod):
            self.emit(Event("blocks", "blocks", total=total, done=done))
        parts = {name: PartRecord.from_payload(part.payload) for name, part in finished.items()}
        self._earlier = merge(parts.values())
        for part in parts.values():
            self.container, self.container_reason = part.container, part.container_reason
            self._kernels_checked = frozenset({()})  # too late for another format
        self.emit(Event("message", f"format {self.container}: {self.container_reason}"))
        rest = runner.tensors_outside_blocks()
        if done < total and isinstance(self.config, LearnedConfig):
            WindowRun(self, self.config, finished, parts, writer).execute()
        elif done < total:
            self._run_blocks(runner, finished, parts, writer)
        del runner  # the streams' memory
        self._sum_flops()  # all processes are through: nobody reads activations any more
        if writer is not None:
            shutil.rmtree(self._activations, ignore_errors=True)
            shutil.rmtree(self.out / STAGING / WORK, ignore_errors=True)
            for name, tensors in outside_parts(self.source.skeleton, rest).items():
                if name not in parts:
                    parts[name] = self._do_rest(name, tensors, writer)
            for name, carried in carried_parts(self.source.carried()).items():
                if name not in parts:
                    parts[name] = self._do_carried(name, carried, writer)
        return list(parts.values())

    def _sum_flops(self) -> None:
        """Passes, statistics and learning of all processes; every process has counted all solves."""
        names = ("passes", "statistics", "learning")
        counts = torch.tensor([self.flops.get(name, 0.0) for name in names], dtype=torch.float64)
        counts = counts.to(self.workers.device)
        self.workers.sum_(counts)
        if self.flops:
            self.flops.update({name: count for name, count in zip(names, counts.tolist(), strict=True) if count})

    def _run_blocks(
        self,
        runner: CalibrationRunner,
        finished: dict[str, FinishedPart],
        parts: dict[str, PartRecord],
        writer: CheckpointWriter | None,
    ) -> None:
        """Quantize block after block, into ``parts``; finished ones are only passed through."""
        for context in runner:
            if context.name in finished:
                self.replay(context, finished[context.name])
                continue
            parts[context.name] = self._do_block(context, runner, writer)
            self.emit(Event("block_done", name=context.name, done=context.index + 1, total=len(runner.block_names)))

    def _do_block(
        self, context: BlockContext, runner: CalibrationRunner, writer: CheckpointWriter | None
    ) -> PartRecord:
        part = PartRecord()
        tensors = self.quantize_block(context, part, packed=writer is not None)
        context.close()  # before the part is noted as finished: its outputs are checked here, and belong to its time
        if writer is not None:
            self._write_block(context, tensors, {}, part, writer)
        return part

    def write_block(
        self,
        context: BlockContext,
        weights: Mapping[str, QuantizedWeight],
        changed: Mapping[str, Tensor],
        part: PartRecord,
        writer: CheckpointWriter | None,
    ) -> None:
        """Write a block whose linears are in ``part.layers``.

        Args:
            weights: by name in the block; changed: other parameters that are no longer the checkpoint's, likewise.
            part: its record; writer: on the process that writes.
        """
        if writer is None:
            return
        tensors: dict[str, Tensor] = {}
        with self.timing.part("write", self.device):
            for name, weight in weights.items():
                tensors.update(self._format.layer_tensors(f"{context.name}.{name}", weight))
        self._write_block(context, tensors, changed, part, writer)

    def _write_block(
        self,
        context: BlockContext,
        tensors: dict[str, Tensor],
        changed: Mapping[str, Tensor],
        part: PartRecord,
        writer: CheckpointWriter,
    ) -> None:
        with self.timing.part("write", self.device):
            done = {f"{record.name}.weight" for record in part.layers}
            full = {f"{context.name}.{name}": value for name, value in changed.items()}
            names = frozenset(name for name in self.source.tensor_names() if name.startswith(f"{context.name}."))
            tensors.update(self._passing(names - done, part, full))
            self._note_cost(part)
            writer.write_part(context.name, tensors, part.payload())

    def _note_cost(self, part: PartRecord) -> None:
        """What was spent since the last part was noted: what lies between two parts belongs to the later one."""
        now = PartRecord(timing=dict(self.timing), flops=dict(self.flops), seconds=time.perf_counter() - self._started)
        part.seconds = now.seconds - self._noted.seconds
        part.timing = {name: value - self._noted.timing.get(name, 0.0) for name, value in now.timing.items()}
        part.flops = {name: value - self._noted.flops.get(name, 0.0) for name, value in now.flops.items()}
        part.container, part.container_reason = self.container, self.container_reason
        self._noted = now

    def quantize_block(self, context: BlockContext, part: PartRecord, *, packed: bool) -> dict[str, Tensor]:
        """Quantize the block's linears; returns their tensors as stored, if ``packed``."""
        tensors: dict[str, Tensor] = {}

        def take(name: str, weight: QuantizedWeight) -> None:
            if packed:
                with self.timing.part("write", self.device):
                    tensors.update(self._format.layer_tensors(f"{context.name}.{name}", weight))

        self.solve_block(context, part, take)
        return tensors

    def solve_block(
        self, context: BlockContext, part: PartRecord, take: Callable[[str, QuantizedWeight], object]
    ) -> None:
        """Let the layer-wise method quantize a block's linears, group after group.

        Args:
            part: gets their records; take: gets every linear's name in the block and its result.
        """
        schemes = self.plan.in_block(context.name)
        self.check_kernels(context)
        self.transform_inputs(context)
        self.warn(part, *fit_static_inputs(context, schemes))
        assert self.layer_method is not None
        for group in context.groups(self.needs, frozenset(schemes)):
            self.emit(Event("layer", name=group.full_name(group.names[0])))
            stats = group.statistics()
            solved = solve_group(
                group, schemes, stats, self.layer_method, self.layer_config, workers=self.workers, timing=self.timing
            )
            for name, result in solved.items():
                group.replace(name, result.weight.dequantize(self.dtype))
                part.layers.append(result.record)
                self.flops["solve"] = self.flops.get("solve", 0.0) + result.flops
                self.warn(part, *(f"{result.record.name}: {note}" for note in result.record.notes))
                self.emit(Event("layer_done", name=result.record.name, record=result.record))
                take(name, result.weight)
            del stats, solved  # before the sums of the next group are there
        self.reached(context, part)

    def reached(self, context: BlockContext, part: PartRecord) -> dict[str, Scheme]:
        """Schemes of those of the block's linears that are called, by name; the others are named in ``part``."""
        schemes = self.plan.in_block(context.name)
        called = {name for group in context.runner.map_of(context).groups for name in group.linears}
        for name in sorted(schemes.keys() - called):
            full = f"{context.name}.{name}"
            self.plan.reasons[full] = "never called: no token reached it, or the model reads its weight directly"
            self.warn(part, f"{full} stays in full precision, {self.plan.reasons[full]}")
        return {name: scheme for name, scheme in schemes.items() if name in called}

    def transform_inputs(self, context: BlockContext, share: Callable[[], float] = lambda: 1.0) -> None:
        """From now on the block's inputs are transformed in the quantized stream as at run time.

        Raises:
            ModelError: keys and values are to be rounded, and the block's attention cannot be reached.
        """
        if self.key_values is not None:
            self._check_key_values(context)
        transform_block_inputs(context, self.plan.in_block(context.name), self.key_values, share)

    def _check_key_values(self, context: BlockContext) -> None:
        """Once a kind of block: rounding keys and values has an effect. Blocks without attention are passed over, if
        there are others."""
        kind = _kind(context.block)
        if kind in self._kinds_checked:
            return
        self._kinds_checked.add(kind)
        hidden, call = context.runner.hidden(0, full=True), context.runner.call(0, context.index, full=True)
        context.use(full=True)
        with context.plain_inputs():
            self._key_values_reached |= supports_key_values(context.block, lambda: call(context.block, hidden))
        kinds = {_kind(self.source.skeleton.get_submodule(name)) for name in self.plan.blocks}
        if not self._key_values_reached and kinds <= self._kinds_checked:
            raise ModelError(
                f"{context.name}: the attention of {type(context.block).__name__} does not go through transformers' "
                f"attention interface, so its keys and values cannot be rounded. Leave out --kv-bits."
            )

    def check_kernels(self, context: BlockContext) -> None:
        """Once a kind of block: linears that runtimes fuse into one kernel must share a scheme, in the format that they
        read. At the first block the format can still be another one."""
        groups = context.runner.map_of(context).groups
        names = tuple(name for group in groups for name in group.linears)
        if self.container == "native" or names in self._kernels_checked:
            return
        first, self._kernels_checked = not self._kernels_checked, self._kernels_checked | {names}
        clashes = clashing_schemes(self.plan, groups)
        if clashes and self.recipe.container == "auto" and first:
            self.choice = self.choice.native_instead(clashes[0])
            self.container, self.container_reason = self.choice.name, self.choice.reason
            self.emit(Event("message", f"format native instead: {clashes[0]}"))
        elif clashes:
            raise UsageError(f"{clashes[0]} ({len(clashes)} such sets). Give them one, or say --container native.")

    def replay(self, context: BlockContext, part: FinishedPart) -> None:
        """Give a finished block its weights, for the streams to pass through."""
        context.runner.map_of(context)  # later blocks may need what this one leaves for them when they are traced
        if not context.runner.has_tokens:
            return
        self.transform_inputs(context)
        tensors = read_shard(self.out / STAGING / part.file)
        for row in part.payload["layers"]:
            rows, columns = row["shape"]
            scheme = Scheme.from_dict(row["scheme"])
            weight = self._format.read_layer(row["name"], tensors, scheme, (rows, columns)).to(self.device)
            name = row["name"].removeprefix(f"{context.name}.")
            context.replace(name, weight.dequantize(self.dtype))
            input_params(context, name, weight.input_params)
        for name, key in part.payload.get("changed", {}).items():
            context.replace_parameter(name.removeprefix(f"{context.name}."), tensors[key])

    @property
    def _format(self) -> Container:
        return CONTAINERS[self.container]

    def warn(self, part: PartRecord, *texts: str) -> None:
        for text in texts:
            part.warnings.append(text)
            self.emit(Event("message", text))

    # -- what passes through -----------------------------------------------------------------------------------------

    def _passing(
        self, names: frozenset[str], part: PartRecord, changed: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Tensors that are not quantized, and noted as kept: the checkpoint's, or what a method ``changed`` them to."""
        tensors = {}
        for key, parameter, tensor in self.source.raw_tensors(names):
            if parameter in changed:
                tensor = _in_place_of(tensor, changed[parameter], key)
                part.changed[parameter] = key
            check_weight(tensor, parameter)
            tensors[key] = tensor
            part.keep(*self.label(parameter, tensor.ndim), tensor.numel(), tensor.nbytes)
        lost = changed.keys() - part.changed.keys()
        if lost:
            raise ModelError(
                f"{min(lost)} was changed, but is stored in another form than in the model: -O scaling=off avoids it."
            )
        return tensors

    def label(self, parameter: str, dimensions: int) -> tuple[str, str]:
        """The name under which a tensor that stays in full precision is listed, and why it stays."""
        reason = self.plan.reasons.get(parameter.rpartition(".")[0])
        if reason is None and dimensions < 2:
            return "norms, biases and other vectors", "small"
        return parameter, reason or self._reason(parameter)

    def _reason(self, parameter: str) -> str:
        model = self.source.skeleton
        module: nn.Module = model.get_submodule(parameter.rpartition(".")[0])
        if module is model.get_output_embeddings():  # type: ignore[no-untyped-call]
            return "the head"
        if module is model.get_input_embeddings():
            return "the embedding"
        if is_router(parameter.rpartition(".")[0]):
            return "chooses experts"
        if parameter in self._experts:
            return FUSED_EXPERTS
        return "no linear of a block"

    def largest_part_outside(self, outside: frozenset[str]) -> int:
        """Bytes of the largest part that is written after the blocks, of the tensors ``outside`` them."""
        parts = outside_parts(self.source.skeleton, outside).values()
        return max(sum(size for _, _, size in self.source.stored_sizes(names)) for names in parts)

    def obstacles(self) -> list[str]:
        """Why `execute` would refuse to go on in the output folder, as far as it can be seen without a lock."""
        journal = Journal.read_only(self.out / STAGING)
        if journal is None:
            return finished_obstacles(self.out, self.recipe, self._fingerprint, self.calibration)
        if journal.conditions is None:
            return []
        changed = changed_conditions(journal.conditions, self.conditions())
        if not changed:
            return []
        return [f"{self.out} holds an unfinished run of other settings ({'; '.join(changed)}): --restart"]

    def _do_rest(self, part_name: str, names: frozenset[str], writer: CheckpointWriter) -> PartRecord:
        part = PartRecord()
        with self.timing.part("write", self.device):
            rest = self._passing(names, part)
            self._note_cost(part)
            if rest:
                writer.write_part(part_name, rest, part.payload())
        return part

    def _do_carried(self, part_name: str, names: list[str], writer: CheckpointWriter) -> PartRecord:
        part = PartRecord()
        with self.timing.part("write", self.device):
            tensors = read_tensors(self.source.carried(), names)
            for name, tensor in tensors.items():
                part.keep(name, NOT_IN_MODEL, tensor.numel(), tensor.nbytes)
            self._note_cost(part)
            writer.write_part(part_name, tensors, part.payload())
        return part

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(
        self, writer: CheckpointWriter, parts: list[PartRecord], tokenizer: PreTrainedTokenizerBase | None
    ) -> Report:
        if self.source.folder is not None:
            rule = self.source.companions
            found = find_companions(self.source.folder, self.out, code=rule.code, text_only=rule.text_only)
            copy_companions(found, writer.companions)
            for note in found.notes():
                self.emit(Event("message", note))
        else:
            generation = getattr(self.source.skeleton, "generation_config", None)
            for companion in (tokenizer, generation):
                if companion is not None:
                    companion.save_pretrained(writer.companions)
        total = merge(parts)
        unused = self.source.unused()
        if unused:
            shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            self.warn(total, f"{len(unused)} tensors of the checkpoint are no part of the model, left out: {shown}")
        now = PartRecord(timing=self.timing, flops=self.flops, seconds=time.perf_counter() - self._started)
        cost = merge([self._earlier, now])  # the parts' own sums lack what lies between them
        total.timing, total.flops, total.seconds = cost.timing, cost.flops, cost.seconds
        self.warn(total, *_idle_windows(total.windows))
        self.warn(total, *dense_experts(total.kept.values(), sum(r.payload_bytes for r in total.layers)))
        report = self._report(writer, total)
        schemes = {
            record.name: Scheme.from_dict(record.scheme) for record in total.layers
        }  # as applied, not as planned
        writer.finish(self._model_config(), self._quantization_config(schemes), report)
        return report

    def _quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        return self._format.quantization_config(
            schemes, self.linears, key_values=self.key_values, others=self._carried_modules()
        )

    def _carried_modules(self) -> list[str]:
        """Modules that a reader other than transformers may have for tensors that are no part of the model."""
        carried = self.source.carried().items()
        return [n.removesuffix(".weight") for n, t in carried if n.endswith(".weight") and len(t.shape) == 2]

    def _model_config(self) -> dict[str, Any]:
        config = self.source.stored_config()
        architectures = config.get("architectures") or [type(self.source.skeleton).__name__]
        return {**config, "architectures": architectures, **self.source.config_changes}

    def _report(self, writer: CheckpointWriter, total: PartRecord) -> Report:
        model = self.source.skeleton
        quantized = sum(r.shape[0] * r.shape[1] for r in total.layers)
        payload = sum(r.payload_bytes for r in total.layers)
        kept = tuple(sorted(total.kept.values(), key=lambda tensor: -tensor.bytes))
        totals = {
            "quantized_parameters": quantized,
            "kept_parameters": total.kept_parameters,
            "payload_bytes": payload,
            "kept_bytes": sum(tensor.bytes for tensor in kept),
            "file_bytes": writer.weight_bytes,
            "source_bytes": (quantized + total.kept_parameters) * self.source.dtype.itemsize,
            "bits_per_weight": 8 * payload / quantized,
            "seconds": total.seconds,
        }
        description = {
            "source": self.source.name,
            "architecture": type(model).__name__,
            "model_type": model.config.model_type,
            "parameters": quantized + total.kept_parameters,
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "fingerprint": self._fingerprint,
        }
        if self.source.quantization is not None:
            description["quantization"] = self.source.quantization.to_dict()
        return Report(
            description,
            self.recipe.record(),
            None if self.calibration is None else self.calibration.describe(),
            self.container,
            self.container_reason,
            tuple(total.layers),
            kept,
            totals,
            total.timing,
            self._environment()
            | {"flops": total.flops, "offload": self.offload, "proofs": self.choice.to_dict()}
            | self._peaks(),
            tuple(total.warnings),
            writer.files(),
            tuple(total.windows),
            companions=tuple(writer.companion_names()),
        )

    def _peaks(self) -> dict[str, int]:
        """Largest memory in use so far: of the process, and of what PyTorch took on the GPU."""
        peaks = {"peak_memory": peak_memory()}
        if self.device.type == "cuda":
            peaks["peak_device"] = torch.cuda.max_memory_allocated(self.device)
        return peaks

    def _environment(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {
            "versions": {name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
            "device": self.device.type,
            "device_name": device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": self.workers.size,
            "pass_dtype": str(self.dtype).removeprefix("torch."),
            "method_config": {k: getattr(self.config, k) for k in type(self.config).__dataclass_fields__},
        }


def _idle_windows(windows: list[dict[str, Any]]) -> list[str]:
    """A sentence if many windows were put back to where they began."""
    idle = sum(row["loss_after"] >= row["loss_before"] for row in windows)
    if idle * _MANY_IDLE < len(windows) or not idle:
        return []
    return [
        f"{idle} of {len(windows)} windows learned nothing: more steps (--iters or --epochs), more calibration data or "
        f"a starting point (--init coreq) may help"
    ]


def _kind(block: nn.Module) -> object:
    """Blocks of one kind have the same class and linears."""
    return type(block), tuple(name for name, module in block.named_modules() if is_linear(module))


def _layer_method(method: LayerMethod | WindowMethod, config: Any) -> tuple[LayerMethod | None, Any]:
    """The method that quantizes linear by linear: the method itself, or what a learned one starts from."""
    if isinstance(method, LayerMethod):
        return method, config
    if config.init == "none":
        return None, None
    start = find_method(config.init)
    assert isinstance(start, LayerMethod)
    return start, make_config(start, {})


def _in_place_of(tensor: Tensor, changed: Tensor, key: str) -> Tensor:
    if tensor.shape != changed.shape:
        raise ModelError(
            f"{key} is stored as {list(tensor.shape)} and was changed as {list(changed.shape)}: -O scaling=off avoids "
            f"it."
        )
    return changed.detach().to("cpu", tensor.dtype)

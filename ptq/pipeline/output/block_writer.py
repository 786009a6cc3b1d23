"""`BlockWriter`: where finished parts of a run go, and where those of an interrupted run are read back.

Of several processes the first one writes; on the others there is no checkpoint, and everything here only keeps records.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from calib.runner.block import BlockContext
from calib.runner.forward import check_weight
from ptq.checkpoint.journal import FinishedPart
from ptq.checkpoint.workspace import WORK
from ptq.checkpoint.writer import CheckpointWriter, read_shard
from ptq.containers.select import CONTAINERS
from ptq.errors import ModelError
from ptq.pipeline.costs import Costs
from ptq.pipeline.inputs.input_transforms import input_params
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.output.quantized_outside import quantize_outside
from ptq.pipeline.output.unquantized import carried_parts, outside_parts, read_tensors
from ptq.pipeline.preparation.sizes import NOT_IN_MODEL
from ptq.quantized import QuantizedWeight
from ptq.report import PartRecord
from ptq.scheme import Scheme

__all__ = ["BlockWriter"]

_UNCHANGED: Mapping[str, Tensor] = MappingProxyType({})


class BlockWriter:
    """The parts of one run.

    Args:
        job: The run.
        costs: Its clock.
        checkpoint: The output folder, on the process that writes.

    Attributes:
        finished: Parts that an interrupted run has left, by name; the same on all processes.
        records: Records of all parts that are finished by now, by name.
    """

    def __init__(self, job: Job, costs: Costs, checkpoint: CheckpointWriter | None) -> None:
        self._job, self._costs, self._checkpoint = job, costs, checkpoint
        left = {} if checkpoint is None else {part.name: part for part in checkpoint.finished}
        self.finished: Mapping[str, FinishedPart] = job.workers.broadcast_object(left)
        self.records = {name: PartRecord.from_payload(part.payload) for name, part in self.finished.items()}
        self._container = CONTAINERS[job.container.name]

    def pack(self, context: BlockContext, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear as they will be stored; nothing on a process that does not write.

        Args:
            context: The block.
            name: The linear's name in the block.
            weight: Its result.
        """
        if self._checkpoint is None:
            return {}
        with self._costs.timing.part("write", self._job.device):
            return self._container.layer_tensors(f"{context.name}.{name}", weight)

    def write_block(
        self,
        context: BlockContext,
        tensors: Mapping[str, Tensor],
        part: PartRecord,
        changed: Mapping[str, Tensor] = _UNCHANGED,
    ) -> None:
        """Write a block whose linears are in ``part.layers``, with everything else that lies in it.

        Args:
            context: The block.
            tensors: What `pack` gave for its linears.
            part: Its record.
            changed: Other parameters that are no longer the checkpoint's, by name in the block.
        """
        self.records[context.name] = part
        if self._checkpoint is None:
            return
        with self._costs.timing.part("write", self._job.device):
            done = {f"{record.name}.weight" for record in part.layers}
            full = {f"{context.name}.{name}": value for name, value in changed.items()}
            source = self._job.source
            names = frozenset(name for name in source.tensor_names() if name.startswith(f"{context.name}."))
            passing = self._passing(names - done, part, full)
            self._costs.note(part)
            self._checkpoint.write_part(context.name, {**tensors, **passing}, part.payload())

    def replay(self, context: BlockContext, inputs: QuantizedInputs) -> None:
        """Give a finished block its weights, for the activations to pass through.

        Args:
            context: The block.
            inputs: What is done to its inputs.
        """
        context.runner.map_of(context)  # later blocks may need what this one leaves for them when they are traced
        if not context.runner.has_tokens:
            return
        inputs.apply(context)
        part = self.finished[context.name]
        tensors = read_shard(self._job.staging / part.file)
        for row in part.payload["layers"]:
            rows, columns = row["shape"]
            scheme = Scheme.from_dict(row["scheme"])
            weight = self._container.read_layer(row["name"], tensors, scheme, (rows, columns)).to(self._job.device)
            name = row["name"].removeprefix(f"{context.name}.")
            if not self._job.method.full_inputs:
                context.replace(name, weight.dequantize(self._job.dtype))
                input_params(context, name, weight)
        for name, key in part.payload["changed"].items():
            context.replace_parameter(name.removeprefix(f"{context.name}."), tensors[key])

    def write_unquantized(self) -> None:
        """Write what lies outside the blocks, and what is no part of the model; to be called after the blocks, when no
        process reads activations any more."""
        if self._checkpoint is None:
            return
        shutil.rmtree(self._job.activations, ignore_errors=True)
        shutil.rmtree(self._job.staging / WORK, ignore_errors=True)
        source = self._job.source
        for name, tensors in outside_parts(source.skeleton, self._job.outside_blocks()).items():
            if name not in self.records:
                self.records[name] = self._write_outside(name, tensors, self._checkpoint)
        for name, carried in carried_parts(source.carried()).items():
            if name not in self.records:
                self.records[name] = self._write_carried(name, carried, self._checkpoint)

    def _write_outside(self, part_name: str, names: frozenset[str], checkpoint: CheckpointWriter) -> PartRecord:
        part = PartRecord()
        with self._costs.timing.part("write", self._job.device):
            quantized = {f"{name}.weight": name for name in self._job.assignment.outside}
            tensors = self._packed_outside(names & quantized.keys(), quantized, part)
            tensors |= self._passing(names - quantized.keys(), part)
            self._costs.note(part)
            if tensors:
                checkpoint.write_part(part_name, tensors, part.payload())
        return part

    def _packed_outside(
        self, names: frozenset[str], quantized: Mapping[str, str], part: PartRecord
    ) -> dict[str, Tensor]:
        """The embedding and the head, packed, where they are quantized."""
        tensors: dict[str, Tensor] = {}
        for _, parameter, tensor in self._job.source.raw_tensors(names):
            check_weight(tensor, parameter)
            name = quantized[parameter]
            weight, record = quantize_outside(name, tensor, self._job.assignment.outside[name])
            tensors |= self._container.layer_tensors(name, weight)
            part.layers.append(record)
        return tensors

    def _write_carried(self, part_name: str, names: list[str], checkpoint: CheckpointWriter) -> PartRecord:
        part = PartRecord()
        with self._costs.timing.part("write", self._job.device):
            tensors = read_tensors(self._job.source.carried(), names)
            for name, tensor in tensors.items():
                part.keep(name, NOT_IN_MODEL, tensor.numel(), tensor.nbytes)
            self._costs.note(part)
            checkpoint.write_part(part_name, tensors, part.payload())
        return part

    def _passing(
        self, names: frozenset[str], part: PartRecord, changed: Mapping[str, Tensor] = _UNCHANGED
    ) -> dict[str, Tensor]:
        """Tensors that are not quantized, noted in ``part``: the checkpoint's, or what they were ``changed`` to."""
        tensors = {}
        for key, parameter, tensor in self._job.source.raw_tensors(names):
            if parameter in changed:
                tensor = _in_place_of(tensor, changed[parameter], key)
                part.changed[parameter] = key
            check_weight(tensor, parameter)
            tensors[key] = tensor
            part.keep(*self._job.labels(parameter, tensor.ndim, part.reasons), tensor.numel(), tensor.nbytes)
        lost = changed.keys() - part.changed.keys()
        if lost:
            raise ModelError(
                f"{min(lost)} was changed, but is stored in another form than in the model: -O scaling=off avoids it."
            )
        return tensors


def _in_place_of(tensor: Tensor, changed: Tensor, key: str) -> Tensor:
    if tensor.shape != changed.shape:
        raise ModelError(
            f"{key} is stored as {list(tensor.shape)} and was changed as {list(changed.shape)}: -O scaling=off avoids "
            f"it."
        )
    return changed.detach().to("cpu", tensor.dtype)

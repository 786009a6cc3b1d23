"""The loop over blocks of layer-wise methods, and one input group solved: by one process, or shared by several."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.distributed import Workers
from calib.runner.runner import BlockContext, LinearGroup, Timing
from calib.stats import GroupStatistics
from ptq.errors import NumericalError, PtqError
from ptq.pipeline.costs import Costs
from ptq.pipeline.events import Event
from ptq.pipeline.inputs.input_ranges import fit_static_inputs
from ptq.pipeline.inputs.input_transforms import input_figures, input_params, stored_scheme
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.output.block_writer import BlockWriter
from ptq.pipeline.output_error import check_energy, layer_losses, losses_flops, lost_energy
from ptq.pipeline.preparation.method_setup import LayerSolver
from ptq.quantized import QuantizedWeight
from ptq.report import LayerRecord, PartRecord
from ptq.scheme import Scheme

__all__ = ["BlockSolver", "Solved", "called_schemes", "owners", "run_layerwise", "solve_group"]

_LOST = 0.9  # relative squared output error from which on a layer is as good as removed


def run_layerwise(job: Job, costs: Costs, inputs: QuantizedInputs, blocks: BlockWriter) -> None:
    """Quantize block after block; finished ones are only passed through.

    Args:
        job: The run, of a layer-wise method.
        costs: Its clock.
        inputs: What is done to the inputs of linears.
        blocks: Where results go.
    """
    done, total = len(blocks.finished.keys() & set(job.blocks)), len(job.blocks)
    job.listener(Event("blocks", "blocks", total=total, done=done))
    if done == total:
        return
    assert job.method.solver is not None
    solver = BlockSolver(job, job.method.solver, costs, inputs)
    for context in job.make_runner(costs):
        if context.name in blocks.finished:
            blocks.replay(context, inputs)
            continue
        part, tensors = PartRecord(), dict[str, Tensor]()
        for name, weight in solver.solve(context, part):
            tensors |= blocks.pack(context, name, weight)
        context.close()  # before the part is noted as finished: its outputs are checked here, and belong to its time
        blocks.write_block(context, tensors, part)
        job.listener(Event("block_done", name=context.name, done=context.index + 1, total=total))


class BlockSolver:
    """Lets a layer-wise method quantize blocks.

    Args:
        job: The run.
        solver: The method with its options.
        costs: The clock of the run.
        inputs: What is done to the inputs of linears.
    """

    def __init__(self, job: Job, solver: LayerSolver, costs: Costs, inputs: QuantizedInputs) -> None:
        self._job, self._solver, self._costs, self._inputs = job, solver, costs, inputs

    def solve(self, context: BlockContext, part: PartRecord) -> Iterator[tuple[str, QuantizedWeight]]:
        """Quantize a block's linears, group after group.

        Args:
            context: The block.
            part: Gets the records of its linears.

        Yields:
            Every linear's name in the block, and its result.
        """
        job, schemes = self._job, self._job.assignment.in_block(context.name)
        self._inputs.apply(context)
        if not job.method.fits_inputs:
            job.warn(part, *fit_static_inputs(context, schemes))
        for group in context.groups(self._solver.needs, frozenset(schemes)):
            job.listener(Event("layer", name=group.full_name(group.names[0])))
            stats = group.statistics()
            solved = solve_group(group, schemes, stats, self._solver, workers=job.workers, timing=self._costs.timing)
            for name, result in solved.items():
                if not job.method.full_inputs:
                    group.replace(name, result.weight.dequantize(job.dtype))
                part.layers.append(result.record)
                self._costs.add_flops("solve", result.flops)
                job.warn(part, *(f"{result.record.name}: {note}" for note in result.record.notes))
                job.listener(Event("layer_done", name=result.record.name, record=result.record))
                yield name, result.weight
            del stats, solved  # before the sums of the next group are there
        called_schemes(job, context, part)


def called_schemes(job: Job, context: BlockContext, part: PartRecord) -> dict[str, Scheme]:
    """Schemes of those of a block's linears that are called, by name in the block.

    Args:
        job: The run.
        context: The block.
        part: Its record, which gets the others and why they stay in full precision.
    """
    schemes = job.assignment.in_block(context.name)
    called = {name for group in context.runner.map_of(context).groups for name in group.linears}
    for name in sorted(schemes.keys() - called):
        full = f"{context.name}.{name}"
        part.reasons[full] = "never called: no token reached it, or the model reads its weight directly"
        job.warn(part, f"{full} stays in full precision, {part.reasons[full]}")
    return {name: scheme for name, scheme in schemes.items() if name in called}


@dataclasses.dataclass(frozen=True)
class Solved:
    """A linear's result and its record."""

    weight: QuantizedWeight
    record: LayerRecord
    flops: float = 0.0


def solve_group(
    group: LinearGroup,
    schemes: Mapping[str, Scheme],
    stats: GroupStatistics | None,
    solver: LayerSolver,
    *,
    workers: Workers,
    timing: Timing,
) -> dict[str, Solved]:
    """Quantize the linears of a group; every process gets all results.

    Args:
        group: The group.
        schemes: By name in the block.
        stats: The group's statistics.
        solver: The method with its options.
        workers: The processes of this run.
        timing: Seconds are added here.

    Raises:
        PtqError: The method cannot do its work on a linear, which is named.
    """
    shapes = {name: group.block.full(name).shape for name in group.names}
    turn = owners([rows * columns for rows, columns in shapes.values()], workers.size)
    shared = _shared(group, schemes)
    mine = {
        name: _solve(group, name, schemes[name], stats, solver, timing, shared[name])
        for name, owner in zip(group.names, turn, strict=True)
        if owner == workers.rank
    }
    if workers.size == 1:
        return mine
    device = group.block.runner.device
    solved = {
        name: _exchange(mine.get(name), owner, workers, device) for name, owner in zip(group.names, turn, strict=True)
    }
    for name, one in solved.items():
        input_params(group.block, name, one.weight)  # rounds this process's inputs likewise
    return solved


def _shared(group: LinearGroup, schemes: Mapping[str, Scheme]) -> dict[str, Mapping[str, Tensor]]:
    """Of every linear, the parameters that it has in common with those of its group that have its scheme; every process
    computes them."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for scheme in {schemes[name] for name in group.names}:
        alike = [name for name in group.names if schemes[name] == scheme]
        shared = scheme.number_format.share((group.weight(name) for name in alike), scheme)
        found.update(dict.fromkeys(alike, shared))
    return found


def owners(costs: Sequence[float], size: int) -> list[int]:
    """The process that solves each linear: the costliest first, each to the process with the least to do."""
    load, turn = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        turn[index] = load.index(min(load))
        load[turn[index]] += costs[index]
    return turn


def _solve(
    group: LinearGroup,
    name: str,
    scheme: Scheme,
    stats: GroupStatistics | None,
    solver: LayerSolver,
    timing: Timing,
    shared: Mapping[str, Tensor],
) -> Solved:
    start, full = time.perf_counter(), group.full_name(name)
    device = group.block.runner.device
    weight = group.weight(name)
    own = None if stats is None else stats.of(name)
    with timing.part("solve", device), _named(full):
        check_energy(weight, own)
        result = solver.method.quantize(weight, own, scheme, solver.config, shared)
    quantized = dataclasses.replace(result.weight, input_params=input_params(group.block, name, result.weight))
    quantized = dataclasses.replace(quantized, scheme=stored_scheme(group.block, name, quantized.scheme))
    nearest, loss, checked = None, None, 0
    if result.losses is not None or own is not None:
        with timing.part("losses", device), _named(full):
            if result.losses is not None:
                nearest, loss = result.losses()
            elif own is not None:
                nearest, loss = layer_losses(weight, quantized, own)
                checked = losses_flops(*quantized.shape, mismatch=own.has_mismatch)
    notes = (*group.notes, *result.notes)
    if loss is not None and loss > _LOST:
        notes += (f"{loss:.0%} of the output's energy is lost: the scheme does not fit this weight",)
    elif own is None and (lost := lost_energy(weight, quantized)) > _LOST:
        notes += (f"{lost:.0%} of the weight's energy is lost: the scheme does not fit this weight",)
    record = LayerRecord(
        name=full,
        method=solver.method.name,
        scheme=quantized.scheme.record(),
        shape=quantized.shape,
        bits_per_weight=quantized.bits_per_weight,
        payload_bytes=quantized.payload_bytes,
        seconds=time.perf_counter() - start,
        loss_rtn=nearest,
        loss=loss,
        figures={**input_figures(group.block, name), **result.figures},
        tokens=None if stats is None else stats.tokens,
        notes=notes,
    )
    return Solved(quantized, record, float(result.flops + checked))


@contextlib.contextmanager
def _named(full: str) -> Iterator[None]:
    """Errors about one linear name it."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(f"{full}: {error}") from error
    except PtqError as error:
        raise error if full in str(error) else type(error)(f"{full}: {error}") from error


def _exchange(mine: Solved | None, owner: int, workers: Workers, device: torch.device) -> Solved:
    """A result from its owner to everyone: plain data first, then every tensor of the weight."""
    plain: Any = None
    tensors: dict[str, Tensor] = {}
    if mine is not None:
        inputs = mine.weight.input_params
        tensors = {"codes": mine.weight.codes, **mine.weight.params, **inputs}
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        plain = (mine.weight.scheme, shapes, tuple(inputs), mine.record, mine.flops)
    scheme, shapes, of_inputs, record, flops = workers.broadcast_object(plain, owner)
    found: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        buffer = tensors[name].to(workers.device) if mine else torch.empty(shape, dtype=dtype, device=workers.device)
        small = buffer.itemsize == 1  # the collectives do not know 8-bit floating point
        workers.broadcast_(buffer.view(torch.uint8) if small else buffer, owner)
        found[name] = buffer.to(device)
    params = {name: found.pop(name) for name in of_inputs}
    return Solved(QuantizedWeight(found.pop("codes"), found, scheme, params), record, flops)

"""One input group: its linears solved, by one process or shared out over several, and their records made."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.distributed import Workers
from calib.runner.runner import LinearGroup, Timing
from calib.stats import GroupStatistics
from ptq.errors import NumericalError, PtqError
from ptq.methods import LayerMethod
from ptq.pipeline.input_transforms import input_params, stored_scheme
from ptq.pipeline.output_error import check_energy, layer_losses, losses_flops
from ptq.quantized import QuantizedWeight
from ptq.report import LayerRecord
from ptq.scheme import Scheme

__all__ = ["Solved", "owners", "solve_group"]


_LOST = 0.9  # relative squared output error from which on a layer is as good as removed


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
    method: LayerMethod,
    config: Any,
    *,
    workers: Workers,
    timing: Timing,
) -> dict[str, Solved]:
    """Quantize the linears of a group; every process gets all results.

    Args:
        group: the linears; schemes: by name in the block; stats: what was gathered.
        method: the method; config: its options.
        workers: the processes of this run; timing: seconds are added here.

    Raises:
        PtqError: the method cannot do its work on a linear, which is named.
    """
    shapes = {name: group.block.full(name).shape for name in group.names}
    turn = owners([rows * columns for rows, columns in shapes.values()], workers.size)
    shared = _shared(group, schemes)
    mine = {
        name: _solve(group, name, schemes[name], stats, method, config, timing, shared[name])
        for name, owner in zip(group.names, turn, strict=True)
        if owner == workers.rank
    }
    if workers.size == 1:
        return mine
    device = group.block.runner.device
    return {
        name: _exchange(mine.get(name), owner, workers, device) for name, owner in zip(group.names, turn, strict=True)
    }


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
    method: LayerMethod,
    config: Any,
    timing: Timing,
    shared: Mapping[str, Tensor],
) -> Solved:
    start, full = time.perf_counter(), group.full_name(name)
    device = group.block.runner.device
    weight = group.weight(name)
    own = None if stats is None else stats.of(name)
    with timing.part("solve", device), _named(full):
        check_energy(weight, own)
        result = method.quantize(weight, own, scheme, config, shared)
    quantized = dataclasses.replace(
        result.weight,
        scheme=stored_scheme(group.block, name, result.weight.scheme),
        input_params=input_params(group.block, name, result.weight.input_params),
    )
    with timing.part("losses", device), _named(full):
        nearest, loss = layer_losses(weight, quantized, own)
    checked = 0 if own is None else losses_flops(*quantized.shape, mismatch=own.has_mismatch)
    notes = (*group.notes, *result.notes)
    if loss is not None and loss > _LOST:
        notes += (f"{loss:.0%} of the output's energy is lost: the scheme does not fit this weight",)
    record = LayerRecord(
        full,
        method.name,
        quantized.scheme.record(),
        quantized.shape,
        quantized.bits_per_weight,
        quantized.payload_bytes,
        time.perf_counter() - start,
        nearest,
        loss,
        dict(result.figures),
        None if stats is None else stats.tokens,
        notes,
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

"""What a run will take: sizes from the plan, time and memory from a short measurement.

Sizes are exact: they follow from shapes and schemes. For time and memory the first blocks are quantized on two batches
of the calibration data, nothing is written, and what depends on the number of batches or blocks is scaled up. Blocks of
another kind than the measured ones count by their parameters.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from calib.model.input_groups import InputGroup
from calib.precision import strict_float32
from calib.runner.activation_store import free_memory
from calib.runner.runner import CalibrationRunner, batch_size
from ptq.learning import LearnedConfig
from ptq.pipeline.costs import Costs
from ptq.pipeline.dry_run.windows import forecast_windows
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.loops.layerwise import BlockSolver
from ptq.pipeline.output.unquantized import outside_parts
from ptq.pipeline.preparation.finished import output_obstacles
from ptq.pipeline.preparation.preflight import check_disk, peak_memory, stream_bytes
from ptq.pipeline.preparation.sizes import Sizes, dense_experts
from ptq.report import KeptTensor, PartRecord

__all__ = ["Forecast", "forecast"]

_MEASURED_BATCHES = 2
_WARM_UP_SECONDS = 10.0  # a first block that took longer is taken as it is: the second would cost as much
_WRITE_RATE = 5e8  # bytes a second, where nothing is known of the disk
_ALIVE = 6  # hidden states that a suspended pass holds: residual, norm, queries, keys and values, output of attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take and give. Sizes in bytes, times in seconds; everything is plain data.

    Args:
        model: name and class.
        container: of the output, and why.
        blocks: how many are quantized.
        linears: how many are quantized.
        quantized_parameters: in these linears.
        kept_parameters: in full precision.
        bits_per_weight: of the quantized linears, with scales and zero points.
        payload_bytes: of the quantized linears.
        kept_bytes: of everything else.
        file_bytes: of all weight files of the output.
        source_bytes: of the weight files of the model.
        kept: what stays in full precision, and why.
        shared: linears of the first block that read the same input and that runtimes may fuse, with their scheme.
        calibration: sequences, tokens in each, batches.
        offload: where activations are kept.
        lockstep: whether a block is run once for all groups; otherwise again for every group.
        seconds: of the whole run, and by kind of work.
        peak_memory: of the process.
        peak_device: of the GPU; ``None`` without one.
        free_disk: now.
        free_memory: now.
        free_device: now.
        warnings: what the user should know.
        learning: of a learned method, `ptq.pipeline.dry_run.windows.WindowForecast`: its windows in words, steps,
            seconds.
    """

    model: str
    architecture: str
    container: str
    container_reason: str
    blocks: int
    linears: int
    quantized_parameters: int
    kept_parameters: int
    bits_per_weight: float
    payload_bytes: int
    kept_bytes: int
    file_bytes: int
    source_bytes: int
    kept: tuple[KeptTensor, ...]
    shared: tuple[tuple[str, ...], ...]
    calibration: dict[str, int] | None
    offload: str
    lockstep: bool
    seconds: float
    timing: dict[str, float]
    peak_memory: int
    peak_device: int | None
    free_disk: int
    free_memory: int
    free_device: int | None
    warnings: tuple[str, ...] = ()
    learning: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def forecast(job: Job) -> Forecast:
    """Measure shortly, and say what ``job`` will take.

    Raises:
        PtqError: Whatever the run itself would meet in the measured blocks.
    """
    costs, sizes = Costs(), job.sizes()
    if job.method.learned is not None and job.tokens is not None:
        found = _learned(job, job.method.learned, costs, sizes, job.tokens)
    else:
        found = _layerwise(job, costs, sizes)
    obstacles = output_obstacles(job.out, job.recipe, job.conditions(), job.fingerprint, job.calibration)
    return dataclasses.replace(found, warnings=(*obstacles, *_warnings(found)))


def _learned(job: Job, config: LearnedConfig, costs: Costs, sizes: Sizes, tokens: Tensor) -> Forecast:
    """The forecast of a learned method: that of what it starts from, and its windows."""
    start = _layerwise(job, costs, sizes)
    with tempfile.TemporaryDirectory(prefix="ptq-forecast-") as folder:
        found = forecast_windows(job, config, costs, tokens, Path(folder))
    timing = start.timing | {"learning": found.seconds}
    if job.method.solver is None:
        del timing["passes"]  # those of the streams belong to the sweeps that learn
    more = found.bytes_a_block * found.largest + (0 if job.offload != "none" else _targets(job, tokens))
    return dataclasses.replace(
        start,
        timing=timing,
        seconds=sum(timing.values()),
        peak_memory=start.peak_memory + (0 if job.device.type == "cuda" else more),
        peak_device=None if start.peak_device is None else start.peak_device + more,
        learning=dataclasses.asdict(found),
    )


def _targets(job: Job, tokens: Tensor) -> int:
    """Bytes of a window's targets, kept where the streams are."""
    return stream_bytes(job.source.skeleton, tokens.numel() // job.workers.size, job.dtype) // 2


def _layerwise(job: Job, costs: Costs, sizes: Sizes) -> Forecast:
    """The forecast of one pass from block to block."""
    tokens, processes = job.tokens, job.workers.size
    size = 1 if tokens is None else batch_size(len(tokens), tokens.shape[1], job.device)
    batches = 1 if tokens is None else math.ceil(len(tokens) / size)
    sample = None if tokens is None else tokens[: _MEASURED_BATCHES * size * processes]
    with tempfile.TemporaryDirectory(prefix="ptq-forecast-") as folder:
        measured = _measure(job, costs, sample, size, Path(folder))
    runner = job.make_runner(costs)
    lockstep = tokens is None or runner.fits_lockstep(measured.groups, tokens.numel() // processes)
    timing = _extrapolate(job, measured, math.ceil(batches / processes), sizes, lockstep=lockstep)
    host, device = _peaks(job, runner, measured, size, lockstep=lockstep)
    return Forecast(
        model=job.source.name,
        architecture=type(job.source.skeleton).__name__,
        container=job.container.name,
        container_reason=job.container.reason,
        blocks=len(job.blocks),
        linears=sizes.linears,
        quantized_parameters=sizes.quantized,
        kept_parameters=sizes.kept_parameters,
        bits_per_weight=8 * sizes.payload / sizes.quantized,
        payload_bytes=sizes.payload,
        kept_bytes=sizes.kept_bytes,
        file_bytes=sizes.file_bytes,
        source_bytes=(sizes.quantized + sizes.kept_parameters) * job.source.dtype.itemsize,
        kept=sizes.kept,
        shared=measured.shared,
        calibration=None
        if tokens is None
        else {"sequences": len(tokens), "seqlen": tokens.shape[1], "batches": batches},
        offload=job.offload,
        lockstep=lockstep,
        seconds=sum(timing.values()),
        timing=timing,
        peak_memory=host,
        peak_device=device,
        free_disk=check_disk(job.out, 0),
        free_memory=free_memory(torch.device("cpu")),
        free_device=free_memory(job.device) if job.device.type == "cuda" else None,
    )


def _peaks(
    job: Job, runner: CalibrationRunner, measured: _Measured, size: int, *, lockstep: bool
) -> tuple[int, int | None]:
    """Largest memory of the process, and of the GPU if the run is on one."""
    base, tokens, on_gpu = peak_memory(), job.tokens, job.device.type == "cuda"
    extra = (
        0 if tokens is None else _extra_memory(job, runner, measured, tokens.numel(), size * tokens.shape[1], lockstep)
    )
    host = base + (extra if not on_gpu else 0)
    if tokens is not None and on_gpu and job.offload == "memory":  # streams of a run on a GPU
        host += stream_bytes(job.source.skeleton, tokens.numel(), job.dtype)
    host = max(host, measured.resident + _largest_outside(job))
    return host, torch.cuda.max_memory_allocated(job.device) + extra if on_gpu else None


def _largest_outside(job: Job) -> int:
    """Bytes of the largest part that is written after the blocks."""
    parts = outside_parts(job.source.skeleton, job.outside_blocks()).values()
    return max(sum(size for _, _, size in job.source.stored_sizes(names)) for names in parts)


def _warnings(result: Forecast) -> tuple[str, ...]:
    found = dense_experts(result.kept, result.payload_bytes)
    if result.file_bytes > result.free_disk:
        found.append(
            f"the output needs {result.file_bytes / 1e9:.2f} GB and the disk has {result.free_disk / 1e9:.2f} GB free"
        )
    if result.peak_memory > result.free_memory + peak_memory():
        found.append(
            f"the run needs {result.peak_memory / 1e9:.2f} GB of memory, {result.free_memory / 1e9:.2f} GB are free: "
            f"--offload disk or fewer calibration sequences"
        )
    if result.peak_device is not None and result.free_device is not None:
        total = torch.cuda.mem_get_info()[1]
        if result.peak_device > total:
            found.append(
                f"the run needs {result.peak_device / 1e9:.2f} GB on a GPU of {total / 1e9:.2f} GB: --offload memory "
                f"or fewer calibration sequences"
            )
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One block's cost, and that of the way to the first block. ``groups``: its map; ``parameters``: its size."""

    start: dict[str, float]
    block: dict[str, float]
    parameters: int
    groups: tuple[InputGroup, ...]
    flops: float
    shared: tuple[tuple[str, ...], ...]
    resident: int


def _measure(job: Job, costs: Costs, tokens: Tensor | None, size: int, folder: Path) -> _Measured:
    """Quantize the first block that has something to quantize, or the first two if that is quick, on few tokens.

    Activations on disk go to ``folder``: the output's own may belong to a run that is under way.
    """
    runner, done = job.make_runner(costs, tokens=tokens, batch=size, folder=folder), 0
    inputs = QuantizedInputs(
        job.source.skeleton,
        job.assignment,
        job.key_values,
        rounds=not job.method.full_inputs,
        fits_inputs=job.method.fits_inputs,
    )
    solver = None if job.method.solver is None else BlockSolver(job, job.method.solver, costs, inputs)
    start: dict[str, float] = {}
    with torch.no_grad(), strict_float32():
        earlier = 0.0
        for context in runner:
            start = start or dict(costs.timing)
            before, part = dict(costs.timing), PartRecord()
            read, earlier = before.get("read", 0.0) - earlier, before.get("read", 0.0)
            if solver is not None:
                collections.deque(solver.solve(context, part), maxlen=0)
            context.close()
            map_ = runner.map_of(context)
            if part.layers or not done:
                block = {name: value - before.get(name, 0.0) for name, value in costs.timing.items()}
                block["read"] = read  # over when the block is handed out; for the first one with the embedding
                parameters = _parameters(job, context.name)
            done += bool(part.layers) or solver is None
            if job.workers.broadcast_object(done == 2 or (done == 1 and sum(block.values()) > _WARM_UP_SECONDS)):
                break  # the first process decides for all
    shared = tuple(g.linears for g in map_.groups if len(g.linears) > 1 and not g.experts)
    resident = int(psutil.Process().memory_info().rss)
    return _Measured(start, block, parameters, map_.groups, map_.flops, shared, resident)


def _parameters(job: Job, block: str) -> int:
    return sum(p.numel() for p in job.source.skeleton.get_submodule(block).parameters())


def _extrapolate(job: Job, measured: _Measured, batches: int, sizes: Sizes, *, lockstep: bool) -> dict[str, float]:
    """Seconds by kind of work, of the whole run."""
    scale = batches / max(1, min(batches, _MEASURED_BATCHES))
    blocks = sum(_parameters(job, block) for block in job.blocks) / measured.parameters
    repeats = 1.0
    if not lockstep and measured.flops:
        points = {group.point: group.flops for group in measured.groups}  # all experts share one
        repeats = 1 + sum(points.values()) / measured.flops
    fraction = 1 / job.workers.size
    factors = {"passes": scale * repeats, "statistics": scale, "solve": fraction, "losses": fraction, "read": 1.0}
    timing = {name: value * blocks * factors.get(name, 1.0) for name, value in measured.block.items()}
    timing["read"] += measured.start.get("read", 0.0)
    timing["passes"] = timing.get("passes", 0.0) + measured.start.get("passes", 0.0)  # mostly the first call of all
    timing["write"] = sizes.file_bytes / _WRITE_RATE
    return timing


def _extra_memory(
    job: Job, runner: CalibrationRunner, measured: _Measured, tokens: int, batch: int, lockstep: bool
) -> int:
    """Bytes that the tokens beyond the measured ones add on the device: streams, and what suspended passes hold."""
    more = max(0, tokens // job.workers.size - _MEASURED_BATCHES * batch)
    width = int(job.source.skeleton.config.get_text_config().hidden_size)
    streams = 2 if runner.two_streams else 1
    kept = width if job.offload == "none" else 0
    alive = max(_ALIVE * width, 2 * width + max(group.width for group in measured.groups)) if lockstep else 0
    return more * streams * (kept + alive) * job.dtype.itemsize

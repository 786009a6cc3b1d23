"""What a run will take: sizes from the plan, time and memory from a short measurement.

Sizes are exact: they follow from shapes and schemes. For time and memory the first blocks are quantized on two batches
of the calibration data, nothing is written, and what depends on the number of batches or blocks is scaled up. Blocks of
another kind than the measured ones count by their parameters.
"""

from __future__ import annotations

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
from ptq.pipeline.dry_run.windows import forecast_windows
from ptq.pipeline.preparation.preflight import check_disk, peak_memory, stream_bytes
from ptq.pipeline.preparation.sizes import Sizes, dense_experts
from ptq.pipeline.run import Run
from ptq.report import KeptTensor, PartRecord

__all__ = ["Forecast", "forecast"]

_MEASURED_BATCHES = 2
_WARM_UP_SECONDS = 10.0  # a first block that took longer is taken as it is: the second would cost as much
_WRITE_RATE = 5e8  # bytes a second, where nothing is known of the disk
_ALIVE = 6  # hidden states that a suspended pass holds: residual, norm, queries, keys and values, output of attention


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take and give. Sizes in bytes, times in seconds; everything is plain data.

    Args:
        model: name and class; format: of the output, and why.
        blocks, linears: how many are quantized; quantized_parameters, kept_parameters: likewise.
        bits_per_weight: of the quantized linears, with scales and zero points.
        payload_bytes: of those; kept_bytes: of everything else; file_bytes: of all weight files; source_bytes: before.
        kept: what stays in full precision, and why.
        shared: linears of the first block that read the same input and that runtimes may fuse, with their scheme.
        calibration: sequences, tokens in each, batches.
        offload: where activations are kept; lockstep: whether a block is run once, or again for every group.
        seconds: of the whole run, and by kind of work; peak_memory: of the process; peak_device: of the GPU or
            ``None``.
        free_disk, free_memory, free_device: now.
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


def forecast(run: Run) -> Forecast:
    """Measure shortly, and say what ``run`` will take.

    Raises:
        PtqError: whatever the run itself would meet in the measured blocks.
    """
    sizes = run.sizes()
    tokens = None if run.calibration is None else run.calibration.tokens
    if isinstance(run.config, LearnedConfig) and tokens is not None:
        return _learned(run, run.config, sizes, tokens)
    return _layerwise(run, sizes, tokens)


def _learned(run: Run, config: LearnedConfig, sizes: Sizes, tokens: Tensor) -> Forecast:
    """The forecast of a learned method: that of what it starts from, and its windows."""
    start = _layerwise(run, sizes, tokens)
    with tempfile.TemporaryDirectory(prefix="ptq-forecast-") as folder:
        found = forecast_windows(run, config, tokens, Path(folder))
    timing = start.timing | {"learning": found.seconds}
    if run.layer_method is None:
        del timing["passes"]  # those of the streams belong to the sweeps that learn
    on_gpu = run.device.type == "cuda"
    more = found.bytes_a_block * found.largest + (0 if run.offload != "none" else _stream(run, tokens))
    changed = dataclasses.replace(
        start,
        timing=timing,
        seconds=sum(timing.values()),
        peak_memory=start.peak_memory + (0 if on_gpu else more),
        peak_device=None if start.peak_device is None else start.peak_device + more,
        learning=dataclasses.asdict(found),
    )
    return dataclasses.replace(changed, warnings=(*run.obstacles(), *_warnings(changed)))


def _stream(run: Run, tokens: Tensor) -> int:
    """Bytes of a window's targets, kept where the streams are."""
    return stream_bytes(run.source.skeleton, tokens.numel() // run.workers.size, run.dtype) // 2


def _layerwise(run: Run, sizes: Sizes, tokens: Tensor | None) -> Forecast:
    """The forecast of one pass from block to block."""
    size = 1 if tokens is None else batch_size(len(tokens), tokens.shape[1], run.device)
    batches = 1 if tokens is None else math.ceil(len(tokens) / size / run.workers.size)
    sample = None if tokens is None else tokens[: _MEASURED_BATCHES * size * run.workers.size]
    with tempfile.TemporaryDirectory(prefix="ptq-forecast-") as folder:
        measured = _measure(run, sample, size, Path(folder))
    scale = batches / max(1, min(batches, _MEASURED_BATCHES))
    runner = run.make_runner()
    lockstep = tokens is None or runner.fits_lockstep(measured.groups, tokens.numel() // run.workers.size)
    timing = _extrapolate(run, measured, scale, sizes, lockstep=lockstep)
    extra = (
        0 if tokens is None else _extra_memory(run, runner, measured, tokens.numel(), size * tokens.shape[1], lockstep)
    )
    on_gpu = run.device.type == "cuda"
    base = peak_memory()
    host = base + (extra if not on_gpu else 0) + (0 if tokens is None or not on_gpu else _host_streams(run, tokens))
    host = max(host, measured.resident + run.largest_part_outside(runner.tensors_outside_blocks()))
    device = torch.cuda.max_memory_allocated(run.device) + extra if on_gpu else None
    free = check_disk(run.out, 0)
    result = Forecast(
        run.source.name,
        type(run.source.skeleton).__name__,
        run.container,
        run.container_reason,
        len(run.plan.blocks),
        sizes.linears,
        sizes.quantized,
        sizes.kept_parameters,
        8 * sizes.payload / sizes.quantized,
        sizes.payload,
        sizes.kept_bytes,
        sizes.file_bytes,
        (sizes.quantized + sizes.kept_parameters) * run.source.dtype.itemsize,
        sizes.kept,
        measured.shared,
        None
        if tokens is None
        else {"sequences": len(tokens), "seqlen": tokens.shape[1], "batches": math.ceil(len(tokens) / size)},
        run.offload,
        lockstep,
        sum(timing.values()),
        timing,
        host,
        device,
        free,
        free_memory(torch.device("cpu")),
        free_memory(run.device) if on_gpu else None,
    )
    return dataclasses.replace(result, warnings=(*run.obstacles(), *_warnings(result)))


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


def _measure(run: Run, tokens: Tensor | None, size: int, folder: Path) -> _Measured:
    """Quantize the first block that has something to quantize, or the first two if that is quick, on few tokens.

    Activations on disk go to ``folder``: the output's own may belong to a run that is under way.
    """
    runner, done = run.make_runner(tokens=tokens, batch=size, folder=folder), 0
    start: dict[str, float] = {}
    with torch.no_grad(), strict_float32():
        earlier = 0.0
        for context in runner:
            start = start or dict(run.timing)
            before, part = dict(run.timing), PartRecord()
            read, earlier = before.get("read", 0.0) - earlier, before.get("read", 0.0)
            if run.layer_method is not None:
                run.quantize_block(context, part, packed=True)
            context.close()
            map_ = runner.map_of(context)
            if part.layers or not done:
                block = {name: value - before.get(name, 0.0) for name, value in run.timing.items()}
                block["read"] = read  # over when the block is handed out; for the first one with the embedding
                parameters = _parameters(run, context.name)
            done += bool(part.layers) or run.layer_method is None
            if run.workers.broadcast_object(done == 2 or (done == 1 and sum(block.values()) > _WARM_UP_SECONDS)):
                break  # the first process decides for all
    shared = tuple(g.linears for g in map_.groups if len(g.linears) > 1 and not g.experts)
    return _Measured(start, block, parameters, map_.groups, map_.flops, shared, _resident())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _parameters(run: Run, block: str) -> int:
    return sum(p.numel() for p in run.source.skeleton.get_submodule(block).parameters())


def _extrapolate(run: Run, measured: _Measured, scale: float, sizes: Sizes, *, lockstep: bool) -> dict[str, float]:
    """Seconds by kind of work, of the whole run."""
    blocks = sum(_parameters(run, block) for block in run.plan.blocks) / measured.parameters
    repeats = 1.0
    if not lockstep and measured.flops:
        points = {group.point: group.flops for group in measured.groups}  # all experts share one
        repeats = 1 + sum(points.values()) / measured.flops
    share = run.workers.size
    factors = {"passes": scale * repeats, "statistics": scale, "solve": 1 / share, "losses": 1 / share, "read": 1.0}
    timing = {name: value * blocks * factors.get(name, 1.0) for name, value in measured.block.items()}
    timing["read"] += measured.start.get("read", 0.0)
    timing["passes"] = timing.get("passes", 0.0) + measured.start.get("passes", 0.0)  # mostly the first call of all
    timing["write"] = sizes.file_bytes / _WRITE_RATE
    return timing


def _extra_memory(
    run: Run, runner: CalibrationRunner, measured: _Measured, tokens: int, batch: int, lockstep: bool
) -> int:
    """Bytes that the tokens beyond the measured ones add on the device: streams, and what suspended passes hold."""
    more = max(0, tokens // run.workers.size - _MEASURED_BATCHES * batch)
    width = int(run.source.skeleton.config.get_text_config().hidden_size)
    streams = 2 if runner.two_streams else 1
    kept = width if run.offload == "none" else 0
    alive = max(_ALIVE * width, 2 * width + max(group.width for group in measured.groups)) if lockstep else 0
    return more * streams * (kept + alive) * run.dtype.itemsize


def _host_streams(run: Run, tokens: Tensor) -> int:
    """Bytes of streams that a run on a GPU keeps in memory."""
    return stream_bytes(run.source.skeleton, tokens.numel(), run.dtype) if run.offload == "memory" else 0

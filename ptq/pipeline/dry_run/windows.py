"""What a learned method will take: time and memory of its windows, from a few steps in the first one.

A window's cost is, with its number of blocks m, the batches n and the time f of one block's forward on one batch:

    targets  n f m        losses  11 h f m a stage       steps  s t m a stage        streams  2 n f a block that leaves

with h of the batches held out. t, the time of a step a block, and f are measured; what is spent once a window
(capturing a graph, storing the state) is what the first window took beyond that.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from calib.checkpoint.reader import ModelSource
from calib.model.structure import find_blocks, find_linears, linear_weight
from calib.precision import strict_float32
from calib.runner.activation_store import free_memory
from calib.runner.runner import BlockWindow
from calib.runner.window_schedule import Window, describe_windows
from ptq.errors import UsageError
from ptq.learning import LearnedConfig
from ptq.learning.split import split_sequences
from ptq.pipeline.costs import Costs
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.loops.windowed import WindowedLoop
from ptq.pipeline.output.block_writer import BlockWriter
from ptq.pipeline.preparation.preflight import peak_memory

__all__ = ["Surroundings", "WindowForecast", "check_learning", "forecast_windows", "learning_bytes"]

_STEPS = 4
_LOSSES = 11  # over what is held out: before the first step, and ten times on the way
_COPIES = 4 + 4 + 4 + 2 + 2  # bytes a weight: target, z / h, its gradient; the rounded weight and its gradient
_ACTIVATIONS = 24  # numbers a token and channel that a block keeps for its backward pass, without the MLP's
_MLP_ACTIVATIONS = 4  # the same for a channel of the MLP


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Where a run works: device, dtype of its passes, number of processes."""

    device: torch.device
    dtype: torch.dtype
    processes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowForecast:
    """Args:
    schedule: in words; windows: how many; visits: of blocks, over all sweeps and stages.
    steps: a stage; seconds: of all learning; bytes_a_block: what a block of a window takes while it learns.
    largest: blocks in the largest window.
    """

    schedule: str
    windows: int
    visits: int
    steps: int
    seconds: float
    bytes_a_block: int
    largest: int


def forecast_windows(job: Job, config: LearnedConfig, costs: Costs, tokens: Tensor, folder: Path) -> WindowForecast:
    """Measure the first window of a learned run on a part of its data.

    Args:
        job: The run.
        config: Of its method.
        costs: Its clock.
        tokens: All of its calibration data.
        folder: For what is on disk meanwhile.

    Raises:
        PtqError: Whatever the run would meet in its first window.
    """
    windows = config.windows(len(job.blocks))
    bits = [scheme.bits for scheme in job.assignment.schemes.values() if scheme is not None]
    split = split_sequences(config, len(tokens), job.workers.size)
    fitted = math.ceil(math.ceil((len(tokens) - split.held_out) / split.batch) / job.workers.size)
    held_out = math.ceil(split.held_out / split.batch)
    batches, steps = fitted + held_out, config.steps(fitted, bits)
    stages = sum(len(shares) for shares in config.sweeps)
    few = dataclasses.replace(config, epochs=0, iters=_STEPS, intra="off", init="none", holdout=0.0, max_passes=0)
    with torch.no_grad(), strict_float32():
        one = _measure(job, few, costs, tokens[: 2 * config.batch * job.workers.size], windows, folder)
    losses = _LOSSES * held_out if held_out else 2 * batches
    per_visit = one.forward * (losses + batches / max(1, stages // len(config.sweeps))) + steps * one.step
    visits = stages * sum(len(window) for window in windows)
    moves = len(config.sweeps) * len(job.blocks) * 2 * batches * one.forward
    seconds = visits * per_visit + moves + len(windows) * stages * one.fixed
    return WindowForecast(
        schedule=describe_windows(windows),
        windows=len(windows),
        visits=visits,
        steps=steps,
        seconds=seconds,
        bytes_a_block=one.bytes_a_block,
        largest=max(map(len, windows)),
    )


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Seconds of a block's forward on a batch, of a step a block, and of what a window takes once."""

    forward: float
    step: float
    fixed: float
    bytes_a_block: int


def _measure(
    job: Job, few: LearnedConfig, costs: Costs, tokens: Tensor, windows: tuple[Window, ...], folder: Path
) -> _Measured:
    runner = job.make_runner(costs, tokens=tokens, batch=few.batch, folder=folder)
    start = _used(job.device)
    for window in runner.windows(windows):
        _clock(job.device, lambda: window.run(0, full=True))  # noqa: B023  # called at once; the first call warms up
        forward = _clock(job.device, lambda: window.run(0, full=True)) / len(window.blocks)  # noqa: B023
        first = _train(job, few, costs, window, folder)
        longer = _train(job, dataclasses.replace(few, iters=3 * few.iters), costs, window, folder)
        break
    step = max(1e-6, (longer - first) / (2 * _STEPS) / len(window.blocks))
    passes = len(runner.batches) * forward * 3 * len(window.blocks)
    return _Measured(
        forward,
        step,
        max(0.0, first - passes - _STEPS * step * len(window.blocks)),
        max(0, _used(job.device) - start) // len(window.blocks),
    )


def _train(job: Job, few: LearnedConfig, costs: Costs, window: BlockWindow, folder: Path) -> float:
    """Seconds of one window's training, whose result is dropped."""
    inputs = QuantizedInputs(job.source.skeleton, job.assignment, job.key_values)
    blocks = BlockWriter(job, costs, None)
    trial = WindowedLoop(job, few, costs, inputs, blocks, folder=folder / "work")
    return _clock(job.device, lambda: trial.try_window(window))


def _clock(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _used(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def learning_bytes(parameters: int, hidden: int, widest: int, tokens: int, itemsize: int, config: LearnedConfig) -> int:
    """Bytes that a block takes while it learns: an estimate from shapes, before anything is read.

    Args:
        parameters: of the block; hidden, widest: of its hidden state and of its widest input.
        tokens: in a step's batch; itemsize: of a number in the passes.
    """
    moments = 0 if config.optimizer == "sign" else 8
    # The offset, its gradient, its value at the lowest loss, and what the optimizer keeps.
    dense = 12 + moments if config.rounding != "nearest" else 0
    kept = tokens * (_ACTIVATIONS * hidden + _MLP_ACTIVATIONS * widest) * itemsize
    return parameters * (itemsize + _COPIES + dense) + kept


def check_learning(source: ModelSource, config: LearnedConfig, tokens: Tensor, run: Surroundings) -> None:
    """Refuse a learned run that cannot work, before anything is computed.

    Args:
        source: the model; config: what is learned; tokens: int64 ``[sequences, seqlen]``.
        run: where it will work.

    Raises:
        UsageError: fewer sequences than a batch has; a rank above every width; the largest window does not fit into
            memory: says how much is needed and which option lowers it.
    """
    if len(tokens) < config.batch * run.processes:
        raise UsageError(
            f"{len(tokens)} calibration sequences are fewer than the {config.batch} of a batch"
            f"{'' if run.processes == 1 else f' on each of {run.processes} processes'}: give more with "
            f"--calib-samples, or take --train-batch {max(1, len(tokens) // run.processes)}."
        )
    blocks = [source.skeleton.get_submodule(name) for name in find_blocks(source.skeleton)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    hidden = int(source.skeleton.config.get_text_config().hidden_size)
    widest = max(linear_weight(m).shape[1] for block in blocks for m in find_linears(block).values())
    if config.lora_rank > widest:
        raise UsageError(f"--lora-rank {config.lora_rank} is above the widest linear's {widest} input channels.")
    batch = config.batch * tokens.shape[1]
    costs = [learning_bytes(size, hidden, widest, batch, run.dtype.itemsize, config) for size in sizes]
    windows = config.windows(len(blocks))
    largest = max(windows, key=lambda window: sum(costs[window.start : window.stop]))
    needed, free = sum(costs[largest.start : largest.stop]), free_memory(run.device)
    if needed > free:
        raise UsageError(
            f"a window of {len(largest)} blocks needs about {needed / 1e9:.1f} GB to learn in and {free / 1e9:.1f} GB "
            f"are free: --train-batch 1 needs less, --window-schedule single or -O edge=1 make windows smaller, and "
            f"--offload disk takes the activations out of memory."
        )

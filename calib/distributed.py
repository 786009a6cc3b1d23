"""Several processes at one quantization: who takes which batches and which solves, and how sums come together.

Started by ``torchrun`` or ``accelerate launch``, with NCCL between GPUs and gloo between CPUs. Every process walks
through the whole model with its own part of the calibration batches; statistics are summed, solves are shared out by
linear, and results are handed to everyone, so that all processes hold the same quantized model. Alone, every operation
here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calib.errors import UsageError, WorkersError

__all__ = ["SINGLE_PROCESS", "Workers", "destroy_distributed", "init_distributed"]

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=2)  # a solve of a large linear on another process may take this long


@dataclasses.dataclass(frozen=True)
class Workers:
    """The processes of this run.

    Args:
        rank: number of this process, 0 is the one that writes; size: how many there are.
        device: where tensors that are exchanged must lie.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the result and talks to the user."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every ``size``-th."""
        return items[self.rank :: self.size]

    def sum_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all processes."""
        if self.size > 1:
            with _partners():
                dist.all_reduce(tensor)

    def maximum_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its elementwise maximum over all processes."""
        if self.size > 1:
            with _partners():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape and dtype, in the order of ranks."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _partners():
            dist.all_gather(parts, tensor.contiguous())
        return parts

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Replace ``tensor`` by that of process ``source``."""
        if self.size > 1:
            with _partners():
                dist.broadcast(tensor, source)

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Plain data of process ``source``, on every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _partners():
            dist.broadcast_object_list(box, source, device=self.device)
        result: T = box[0]
        return result


SINGLE_PROCESS = Workers()


@contextlib.contextmanager
def _partners() -> Iterator[None]:
    """A collective that fails does so because another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise WorkersError(
            "another process of this run has ended, so this one stops too; its own message says why. Finished blocks "
            f"are kept: the same command goes on from there. ({str(error).splitlines()[0][:200]})"
        ) from error


def init_distributed(device: torch.device) -> tuple[Workers, torch.device]:
    """This process among those that ``torchrun`` or ``accelerate launch`` started, or alone.

    A process group that the caller has made is used as it is.

    Args:
        device: what was asked for; ``cuda`` without an index becomes the GPU of the local rank.

    Returns:
        The workers and the device of this process.

    Raises:
        UsageError: more processes than GPUs on this machine.
    """
    started = dist.is_available() and dist.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return SINGLE_PROCESS, device
    if str(device) == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UsageError(f"process {local} of this machine has no GPU: it has {count}. Start at most {count}.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not started:
        _meet(device)
    exchange = device if dist.get_backend() == "nccl" else torch.device("cpu")
    return Workers(dist.get_rank(), dist.get_world_size(), exchange), device


def _meet(device: torch.device) -> None:
    if device.type == "cuda" and str(device) != f"cuda:{os.environ.get('LOCAL_RANK', '0')}":
        raise UsageError(f"several processes cannot all work on {device}: say --device cuda, and each takes its own.")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot find each other: start them with "
            f"torchrun or accelerate launch, or unset it. ({str(error).splitlines()[0][:200]})"
        ) from error


def destroy_distributed() -> None:
    """Close the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

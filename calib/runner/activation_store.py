"""Where the hidden states of a stream live between two blocks: on the device, in memory, or on disk.

An `ActivationStore` is a list of tensors, one per calibration batch. ``store[i]`` gives the batch on the device; on a
GPU the next one is fetched while this one is worked on. Values are the same bits wherever they are kept.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from calib.errors import OutputError, UsageError, unknown_name

__all__ = ["OFFLOADS", "ActivationStore", "Offload", "OffloadTarget", "free_memory", "settle_offload", "total_memory"]

Offload = Literal["auto", "none", "memory", "disk"]
OffloadTarget = Literal["none", "memory", "disk"]
OFFLOADS: tuple[Offload, ...] = ("auto", "none", "memory", "disk")
_SHARE = 0.35  # of what is free: both streams, before the next cheaper place is taken


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, to be used again
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(psutil.virtual_memory().available)


def total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(psutil.virtual_memory().total)


def settle_offload(asked: Offload, size: int, device: torch.device) -> OffloadTarget:
    """Where streams of ``size`` bytes together go.

    Args:
        asked: ``none`` (the device), ``memory``, ``disk``; ``auto`` takes the first with room, in that order.
        size: bytes of all streams.
        device: where blocks are run.

    Raises:
        UsageError: an unknown target.
    """
    if asked not in OFFLOADS:
        raise unknown_name("offload", asked, OFFLOADS)
    if asked != "auto":
        return "none" if asked == "memory" and device.type == "cpu" else asked
    if size <= _SHARE * free_memory(device):
        return "none"
    if device.type != "cpu" and size <= _SHARE * free_memory(torch.device("cpu")):
        return "memory"
    return "disk"


class ActivationStore:
    """Hidden states, ``[sequences, tokens, width]`` a batch (some models put a dimension before these).

    Args:
        device: where they are used; target: where they are kept.
        folder: for ``disk``; its content is removed by `close`.

    Raises:
        UsageError: ``disk`` without a folder.
    """

    def __init__(self, device: torch.device, target: OffloadTarget = "none", folder: Path | None = None) -> None:
        if target == "disk" and folder is None:
            raise UsageError("activations on disk need a folder.")
        self._device, self._target, self._folder = device, target, folder
        self._items: list[Any] = []  # tensors, or (path, shape, dtype)
        self.shapes: list[tuple[int, int]] = []  # sequences and tokens of every batch
        self.width = 0  # numbers a token
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ptq-prefetch") if target != "none" else None
        self._side: Any = None
        if device.type == "cuda" and target != "none":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._coming: tuple[int, Future[tuple[Tensor, Any]]] | None = None
        if target == "disk" and folder is not None:
            with _disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(sequences * length for sequences, length in self.shapes)

    def append(self, hidden: Tensor, shape: tuple[int, int]) -> None:
        """Add a batch of ``shape`` (sequences, tokens)."""
        self.shapes.append(shape)
        self.width = hidden.numel() // (shape[0] * shape[1])
        self._items.append(self._put(len(self._items), hidden))

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        if self._coming is not None and self._coming[0] == index:
            self._coming[1].result()  # nobody writes while it is read
            self._coming = None
        self._items[index] = self._put(index, hidden)

    def __getitem__(self, index: int) -> Tensor:
        """The batch on the device; the next one is fetched meanwhile."""
        return self.fetch(index, (index + 1) % len(self))

    def fetch(self, index: int, following: int) -> Tensor:
        """The batch on the device; ``following`` is fetched meanwhile."""
        if self._reader is None:
            item: Tensor = self._items[index]
            return item
        hidden, event = self._take(index)
        if following != index:
            self._coming = (following, self._reader.submit(self._fetch, following))
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            hidden.record_stream(torch.cuda.current_stream(self._device))
        return hidden

    def close(self) -> None:
        """Remove what lies outside the device; a stream on the device goes with its last user."""
        if self._reader is None:
            return
        self._reader.shutdown()
        self._items, self._coming = [], None
        if self._target == "disk" and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, index: int) -> tuple[Tensor, Any]:
        if self._coming is not None and self._coming[0] == index:
            coming, self._coming = self._coming[1], None
            return coming.result()
        assert self._reader is not None
        return self._reader.submit(self._fetch, index).result()

    def _put(self, index: int, hidden: Tensor) -> Any:
        if self._target == "none":
            return hidden
        host = hidden.detach().to("cpu").contiguous()
        if self._target == "memory":
            return host.pin_memory() if self._side is not None else host
        assert self._folder is not None
        path = self._folder / f"{index:06d}.bin"
        with _disk_errors(path):
            host.view(torch.uint8).numpy().tofile(path)
        return path, tuple(host.shape), host.dtype

    def _fetch(self, index: int) -> tuple[Tensor, Any]:
        """The batch on the device, and the event after which it is there (GPU only)."""
        item = self._items[index]
        host = item if isinstance(item, Tensor) else _read(*item)
        if self._side is None:
            return host.to(self._device), None
        with torch.cuda.stream(self._side):
            hidden = host.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        return hidden, event


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with _disk_errors(path):
        data = np.fromfile(path, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot keep activations in {path}: {error.strerror or error}. Free space there, or use fewer or shorter "
            f"calibration sequences."
        ) from error

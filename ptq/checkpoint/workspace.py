"""`Workspace`: what a run of several passes keeps for itself while it is under way; removed at the end.

Files beside the shards of finished blocks, each complete or not there at all, with a payload of plain data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calib.checkpoint.atomic_files import os_errors, write_file
from ptq.errors import OutputError

__all__ = ["WORK", "Workspace"]

WORK = "work"  # the folder's name in the staging folder
_SUFFIX = ".safetensors"


class Workspace:
    """Named files in a folder.

    Args:
        folder: created at the first write; one that all processes of a run see.
        writes: whether this process writes; the others only read.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._folder, self._writes = folder, writes

    def names(self) -> list[str]:
        """Names of complete files, sorted."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))

    def save(self, name: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any]) -> None:
        """Write a file; when this returns it survives a crash.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        if not self._writes:
            return
        with os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        text = json.dumps(payload, allow_nan=False)
        metadata = {"payload": text, "sha256": _digest(name, text, ready)}
        write_file(self._folder / f"{name}{_SUFFIX}", lambda path: save_file(ready, path, metadata=metadata))

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU.

        Raises:
            OutputError: it is not there, or damaged.
        """
        return self._read(name)[0]

    def payload(self, name: str) -> dict[str, Any]:
        """The payload of a file; see `load`."""
        return self._read(name)[1]

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Content and payload, as they were written under this name."""
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            text = metadata["payload"]
            if metadata["sha256"] != _digest(name, text, found):
                raise ValueError("its content is not what was written")
            payload: dict[str, Any] = json.loads(text)
            return found, payload
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise OutputError(f"{path} is damaged ({error}): start over with --restart.") from error

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self._writes:
            (self._folder / f"{name}{_SUFFIX}").unlink(missing_ok=True)

    def close(self) -> None:
        """Remove everything."""
        if self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)


def _digest(name: str, payload: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything that a file says, its name included."""
    digest = hashlib.sha256(f"{name}\n{payload}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()

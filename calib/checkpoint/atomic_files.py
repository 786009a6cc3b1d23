"""Files that survive a crash: synced, renamed into place, hashed. Errors of the system become an `OutputError`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from calib.errors import OutputError

__all__ = ["file_sha256", "os_errors", "sync", "sync_tree", "write_file", "write_json"]


def write_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, rename it, and sync the folder.

    After a crash at any moment ``path`` is either as it was before or complete. Several processes may write it at the
    same time if ``shared``: each has a temporary file of its own, which a crash leaves behind.

    Raises:
        OutputError: the disk is full or the file cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else path.name + ".tmp")
    with os_errors(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask allows; safetensors would leave 0600
            write(temporary)
            temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk, half a shard is in the way
            raise
        sync(path.parent)


def write_json(path: Path, data: Mapping[str, Any], *, shared: bool = False) -> None:
    """`write_file` of indented JSON, keys in the order of ``data``."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), shared=shared)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256", _bufsize=2**20).hexdigest()


@contextlib.contextmanager
def os_errors(path: Path, verb: str = "write") -> Iterator[None]:
    """Turn errors of the operating system into an `OutputError` that names the file and what was tried (``verb``)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot {verb} {path}: {reason}. Free space or rights may be missing there; once that is mended, the same "
            f"command goes on from what is finished."
        ) from error

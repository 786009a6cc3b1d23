"""`CheckpointWriter`: a Hugging Face folder written so that a crash never leaves a wrong model.

Everything is first written to ``OUT/.ptq_partial`` (every file under a temporary name, synced, then renamed), and moved
into place by `finish`: the old ``config.json`` goes first, the new one comes last, and a folder without ``config.json``
does not load. Until `finish`, the result of an earlier run stays whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ptq.errors import OutputError
from ptq.formats.native import GUARD_KEY, GUARD_SENTENCE, QUANT_METHOD
from ptq.report import REPORT_NAME, STAGING, Report

__all__ = ["COMPANIONS", "STAGING", "CheckpointWriter", "check_output_folder"]

LOCK = ".ptq_lock"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
"""Patterns of the files that are copied unchanged from the source model's folder."""


def check_output_folder(out: Path) -> None:
    """Refuse a folder with content that is not ours. Call it before any long work.

    Raises:
        OutputError: ``out`` is a file, or a folder that holds files and neither our report nor our unfinished run.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a new folder for the output.")
    if not out.exists() or (out / REPORT_NAME).exists() or (out / STAGING).exists():
        return
    if any(path.name != LOCK for path in out.iterdir()):
        raise OutputError(
            f"{out} is not empty and was not written by ptq (it has no {REPORT_NAME}): name a new or empty folder."
        )


class CheckpointWriter:
    """Writes one checkpoint: `write_shard` for every finished part, then `finish`.

    Args:
        out: the output folder; created if missing. An earlier output of ours is replaced by `finish`, what an
            interrupted run left is removed at once.

    Raises:
        OutputError: see `check_output_folder`, or the folder cannot be created.
    """

    def __init__(self, out: Path) -> None:
        check_output_folder(out)
        self.out = out
        self.staging = out / STAGING
        self.weight_bytes = 0
        self._shards: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._tensor_bytes = 0
        self._dense_dtypes: Counter[str] = Counter()
        with _os_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            # Released by `release`, or with this object, or with the process, however it ends.
            self._unlock = weakref.finalize(self, os.close, _acquire(out / LOCK))
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs write to the folder again."""
        if self._unlock.alive:
            (self.out / LOCK).unlink(missing_ok=True)
            self._unlock()

    def write_shard(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write one safetensors file, durably; returns its path (until `finish`).

        Raises:
            OutputError: the disk is full or the file cannot be written.
            ValueError: a tensor of that name has been written before.
        """
        again = self._shard_of.keys() & tensors.keys()
        if again:
            raise ValueError(f"{min(again)} was written before")
        path = self.staging / f"shard-{len(self._shards):05d}.safetensors"
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt"}))
        self._shard_of |= dict.fromkeys(ready, len(self._shards))
        self._shards.append(path)
        self._tensor_bytes += sum(tensor.nbytes for tensor in ready.values())
        self.weight_bytes += path.stat().st_size
        for name, tensor in ready.items():
            if tensor.is_floating_point() and not name.endswith(".weight_scale"):
                self._dense_dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        return path

    def copy_companions(self, source: Path) -> None:
        """Copy tokenizer and generation files from a model folder (`COMPANIONS`); other files may be put in `staging`.

        Raises:
            OutputError: a file cannot be copied.
        """
        for pattern in COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    with _os_errors(self.staging / path.name):
                        shutil.copyfile(path, self.staging / path.name)

    def finish(self, config: Mapping[str, Any], quantization_config: Mapping[str, Any], report: Report) -> None:
        """Write ``config.json``, the index and the report, and move everything into place.

        Args:
            config: the source model's config as plain data; its own ``quantization_config`` is dropped, and a missing
                ``dtype`` is filled in with that of the tensors that were not quantized.
            quantization_config: from the format's module.
            report: becomes ``ptq_report.json``.

        Raises:
            OutputError: the disk is full or a file cannot be written or moved.
        """
        names = self._final_names()
        if len(names) > 1:
            weight_map = {tensor: names[shard] for tensor, shard in sorted(self._shard_of.items())}
            _write_json(
                self.staging / INDEX, {"metadata": {"total_size": self._tensor_bytes}, "weight_map": weight_map}
            )
        _write_json(self.staging / "config.json", self._full_config(config, quantization_config))
        _write(self.staging / REPORT_NAME, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
        with _os_errors(self.out):
            self._move_into_place(names)
            self.release()

    def _full_config(self, config: Mapping[str, Any], quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        full = {key: value for key, value in config.items() if key != GUARD_KEY}
        if self._dense_dtypes and not (full.get("dtype") or full.get("torch_dtype")):
            # Without it, transformers takes the first floating tensor it meets for the model's dtype: a scale.
            full["dtype"] = self._dense_dtypes.most_common(1)[0][0]
        full["quantization_config"] = dict(quantization_config)
        if quantization_config["quant_method"] == QUANT_METHOD:
            full[GUARD_KEY] = GUARD_SENTENCE
        return full

    def _final_names(self) -> list[str]:
        if len(self._shards) == 1:
            return ["model.safetensors"]
        total = len(self._shards)
        return [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]

    def _move_into_place(self, names: list[str]) -> None:
        (self.out / "config.json").unlink(missing_ok=True)  # from here to the last line, the folder does not load
        for stale in [*self.out.glob("model*.safetensors"), self.out / INDEX]:
            stale.unlink(missing_ok=True)
        for shard, name in zip(self._shards, names, strict=True):
            os.replace(shard, self.out / name)
        last = self.staging / "config.json"
        for path in sorted(self.staging.iterdir()):
            target = self.out / path.name
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)
            if path != last:
                os.replace(path, target)
        _sync(self.out)
        os.replace(last, self.out / "config.json")
        self.staging.rmdir()
        _sync(self.out)


def _acquire(path: Path) -> int:
    """The descriptor of an open, locked file.

    Raises:
        OutputError: another run holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"another run is writing to {path.parent}: wait for it, or name another folder.") from error
    return handle


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with _os_errors(path):
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask allows; safetensors would leave 0600
        write(temporary)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into an `OutputError` that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write {path}: {reason}. Free space or rights may be missing there.") from error

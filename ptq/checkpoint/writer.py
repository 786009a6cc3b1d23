"""`CheckpointWriter`: a Hugging Face folder written so that a crash never leaves a wrong model and costs one block.

Everything is first written to ``OUT/.ptq_partial`` (every file under a temporary name, synced, then renamed, and noted
in the journal), and moved into place by `finish`: the old ``config.json`` goes first, the new one comes last, and a
folder without ``config.json`` does not load. Until `finish`, the result of an earlier run stays whole. The next writer
with the same conditions takes over what is finished, wherever the last one was cut off.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.checkpoint.atomic_files import file_sha256, os_errors, sync, sync_tree, write_file, write_json
from ptq.checkpoint.journal import JOURNAL_NAME, FinishedPart
from ptq.checkpoint.resume import open_journal, shard_name
from ptq.containers.native import GUARD_KEY, NATIVE
from ptq.containers.vllm_tensors import VLLM_TENSORS
from ptq.errors import OutputError
from ptq.model_card import CARD_NAME, card_is_ours
from ptq.report import REPORT_NAME, STAGING, Report

__all__ = ["STAGING", "CheckpointWriter", "check_new_folder", "check_output_folder", "read_shard"]

LOCK = ".ptq_lock"
INDEX = "model.safetensors.index.json"
COMPANIONS = "companions"  # in the staging folder
_DENSE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


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


def check_new_folder(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a folder for a changed copy of a result that is that result, or in use.

    Args:
        source: The result.
        target: The new folder.
        overwrite: Another result of ours may be there.

    Raises:
        OutputError: Says which, and what to do.
    """
    if target.resolve() == source.resolve():
        raise OutputError(f"{target} is the result itself: name another folder with -o.")
    check_output_folder(target)
    if (target / REPORT_NAME).exists() and not overwrite:
        raise OutputError(f"{target} holds a result of ptq: name another folder with -o, or replace it (--overwrite).")


class CheckpointWriter:
    """Writes one checkpoint: `write_part` for every finished part, then `finish`.

    Args:
        out: the output folder; created if missing. An earlier output of ours is replaced by `finish`.
        conditions: everything that decides the bytes, as flat plain data (`ptq.checkpoint.journal.flatten`). What an
            interrupted run with the same conditions finished is in ``finished``, to be read with `read_part` and not
            written again. ``None``: start over, and let nobody go on from here.
        restart: start over whatever is there.

    Attributes:
        finished: parts that are on the disk, in the order they were written.
        notes: sentences for the user about what was found there.

    Raises:
        OutputError: see `check_output_folder`; the folder cannot be created; another run is writing there; the
            interrupted run had other conditions, or its journal is damaged or of a newer version.
    """

    def __init__(self, out: Path, conditions: Mapping[str, Any] | None = None, restart: bool = False) -> None:
        check_output_folder(out)
        self.out = out
        self.staging = out / STAGING
        self._shard_of: dict[str, int] = {}
        self._tensor_bytes = 0
        self._dense_dtypes: Counter[str] = Counter()
        with os_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            # Released by `release`, or with this object, or with the process, however it ends.
            self._unlock = weakref.finalize(self, _acquire(out / LOCK).release)
        try:
            self._journal, self.notes = open_journal(out, conditions, restart)
            for index in range(len(self._journal.parts)):
                self._take_in(index)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs write to the folder again."""
        if self._unlock.alive:
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                (self.out / LOCK).unlink(missing_ok=True)
            self._unlock()

    @property
    def finished(self) -> list[FinishedPart]:
        return list(self._journal.parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files so far."""
        return sum(part.bytes for part in self._journal.parts)

    # -- parts -------------------------------------------------------------------------------------------------------

    def write_part(self, name: str, tensors: Mapping[str, Tensor], payload: Mapping[str, Any] | None = None) -> Path:
        """Write one safetensors file and note it as finished; when this returns, a power cut does not undo it.

        Args:
            name: of the part, unique.
            tensors: its tensors; those on a GPU or not contiguous are copied, others are written from where they are.
            payload: plain data that a resumed run finds in ``finished``.

        Returns:
            The file's path until `finish`.

        Raises:
            OutputError: the disk is full or a file cannot be written. Nothing is noted then, and what was finished
                before stays.
            TypeError, ValueError: a part or tensor of that name was written before; the payload is not plain data.
        """
        if any(part.name == name for part in self._journal.parts):
            raise ValueError(f"the part {name} was written before")
        again = self._shard_of.keys() & tensors.keys()
        if again:
            raise ValueError(f"{min(again)} was written before")
        path = self.staging / shard_name(len(self._journal.parts))
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_file(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt"}))
        with os_errors(path, "read"):
            size, digest = path.stat().st_size, file_sha256(path)
        self._journal.add_part(FinishedPart(name, path.name, size, digest, dict(payload or {})))
        self._take_in(len(self._journal.parts) - 1)
        return path

    def read_part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished part, on the CPU.

        Raises:
            KeyError: there is no such part.
            OutputError: the file cannot be read.
        """
        files = {part.name: part.file for part in self._journal.parts}
        return read_shard(self.staging / files[name])

    def files(self) -> dict[str, dict[str, Any]]:
        """``{"bytes", "sha256"}`` of every weight file by its final name, for `Report.files`."""
        parts = self._journal.parts
        return {
            name: {"bytes": part.bytes, "sha256": part.sha256}
            for name, part in zip(_final_names(len(parts)), parts, strict=True)
        }

    def _take_in(self, index: int) -> None:
        """Note what `finish` has to know of a shard, from its header: the same for fresh and for resumed parts."""
        part = self._journal.parts[index]
        path = self.staging / part.file
        with os_errors(path, "read"), safe_open(path, "pt") as file, path.open("rb") as raw:
            self._tensor_bytes += part.bytes - 8 - int.from_bytes(raw.read(8), "little")  # all but the header
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                self._shard_of[name] = index
                dtype = _DENSE_DTYPES.get(tensor.get_dtype())
                if dtype and not name.endswith((".weight_scale", ".scales")):
                    self._dense_dtypes[dtype] += math.prod(tensor.get_shape())

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def companions(self) -> Path:
        """The folder for the files that will lie beside the weights (`ptq.checkpoint.companions`)."""
        folder = self.staging / COMPANIONS
        with os_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def companion_names(self) -> list[str]:
        """Names of these files, relative to the output folder."""
        return _files_below(self.staging / COMPANIONS)

    def finish(self, config: Mapping[str, Any], quantization_config: Mapping[str, Any] | None, report: Report) -> None:
        """Write ``config.json``, the index and the report, and move everything into place.

        Cut off at any moment, the next writer with the same conditions has all parts and comes here again.

        Args:
            config: the source model's config as plain data; its own ``quantization_config`` is dropped, and a missing
                ``dtype`` is filled in with that of the tensors that were not quantized.
            quantization_config: from the container; ``None`` for a model in full precision.
            report: becomes ``ptq_report.json``; give it `files`.

        Raises:
            OutputError: the disk is full or a file cannot be written or moved.
        """
        names = _final_names(len(self._journal.parts))
        if len(names) > 1:
            weight_map = {tensor: names[shard] for tensor, shard in sorted(self._shard_of.items())}
            write_json(self.staging / INDEX, {"metadata": {"total_size": self._tensor_bytes}, "weight_map": weight_map})
        write_json(self.staging / "config.json", self._full_config(config, quantization_config))
        write_file(self.staging / REPORT_NAME, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
        with os_errors(self.out):
            sync_tree(self.staging)
            self._journal.add_finishing(names)
            self._move_into_place(names)
            self.release()

    def _full_config(self, config: Mapping[str, Any], quantization_config: Mapping[str, Any] | None) -> dict[str, Any]:
        full = {key: value for key, value in config.items() if key not in (GUARD_KEY, "quantization_config")}
        if self._dense_dtypes and not (full.get("dtype") or full.get("torch_dtype")):
            # Without it, transformers takes the first floating tensor it meets for the model's dtype: a scale.
            full["dtype"] = self._dense_dtypes.most_common(1)[0][0]
        if quantization_config is None:
            return full
        full["quantization_config"] = dict(quantization_config)
        if quantization_config["quant_method"] == NATIVE.quant_method:
            full |= NATIVE.config_entries()
        elif quantization_config.get("transform_config"):
            full |= VLLM_TENSORS.config_entries()
        return full

    def _move_into_place(self, names: Sequence[str]) -> None:
        (self.out / "config.json").unlink(missing_ok=True)  # from here to the end, the folder does not load
        sync(self.out)
        for stale in [*self.out.glob("model*.safetensors"), self.out / INDEX, *_earlier_companions(self.out)]:
            stale.unlink(missing_ok=True)
        for part, name in zip(self._journal.parts, names, strict=True):
            os.replace(self.staging / part.file, self.out / name)
        self._move_companions()
        last, journal = self.staging / "config.json", self.staging / JOURNAL_NAME
        for path in sorted(set(self.staging.iterdir()) - {last, journal}):
            os.replace(path, self.out / path.name)
        sync(self.out)
        os.replace(last, self.out / "config.json")
        sync(self.out)
        journal.unlink()  # the result is whole: from here on nothing is left to be done again
        self.staging.rmdir()
        sync(self.out)

    def _move_companions(self) -> None:
        beside = self.staging / COMPANIONS
        names = self.companion_names()
        for name in names:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, self.out / name)
        for folder in {(self.out / name).parent for name in names} - {self.out}:
            sync(folder)
        shutil.rmtree(beside, ignore_errors=True)  # folders that are empty by now


def _files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, with ``/`` on every system."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _earlier_companions(out: Path) -> list[Path]:
    """The files that an earlier run put beside its weights, by its report: never one outside the folder, and no model
    card that somebody has put in the place of ours."""
    try:
        names = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))["companions"]
        paths = [out / name for name in names if name != CARD_NAME or card_is_ours(out)]
    except (OSError, ValueError, KeyError, TypeError):  # no report, or one that does not list them
        return []
    inside = [path for path in paths if path.parent.resolve().is_relative_to(out.resolve())]
    return [path for path in inside if path.is_file() or path.is_symlink()]


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a finished shard, on the CPU.

    Raises:
        OutputError: the file cannot be read; with several processes, the folder must be one that all of them see.
    """
    with os_errors(path, "read"):
        return load_file(path)


def _final_names(total: int) -> list[str]:
    if total == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]


def _acquire(path: Path) -> FileLock:
    """The lock of an output folder, held until it is released or the process ends, however it does.

    Raises:
        OutputError: another run holds it.
    """
    lock = FileLock(path, thread_local=False)  # whichever thread finds the writer unused releases it
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another run is writing to {path.parent}: wait for it, or name another folder.") from error
    return lock

"""`export`: from a finished result to a folder or file that another runtime reads."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from calib.checkpoint.atomic_files import write_json
from calib.checkpoint.files import resolve_model
from ptq.checkpoint.card import add_card
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.checkpoint.writer import CheckpointWriter, check_new_folder
from ptq.containers.native import NATIVE
from ptq.errors import OutputError, UsageError, unknown_name
from ptq.export.dense import DENSE_DTYPES, DenseExport
from ptq.export.dense_copy import write_dense_copy
from ptq.export.gguf.write import EMBEDDING_TYPES, write_gguf
from ptq.export.imported import ImportedResult
from ptq.export.repack import ContainerExport
from ptq.export.result import Part, Result
from ptq.pipeline.events import Event, Listener, ignore_events
from ptq.pipeline.preparation.preflight import check_disk
from ptq.report import REPORT_NAME, STAGING, Report

__all__ = ["EXPORT_FORMATS", "export"]


class FolderExport(Protocol):
    """How one format writes a folder."""

    name: str

    def notes(self) -> list[str]:
        """What a reader of the folder does not do, one sentence each."""

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """What one weight file of the result becomes."""

    def config(self) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """``config.json``, its ``quantization_config``, and more files."""


FOLDER_FORMATS: Mapping[str, Callable[[Result, str], FolderExport]] = {
    **dict.fromkeys(("compressed-tensors", "gptq", "awq", "native"), ContainerExport),
    **dict.fromkeys(DENSE_DTYPES, DenseExport),
}
"""Formats that are folders."""
EXPORT_FORMATS = (*FOLDER_FORMATS, "gguf")
"""What ``--format`` takes."""


def export(
    result: str | os.PathLike[str],
    *,
    format: str,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    embedding: str = "auto",
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> Report:
    """Write a finished result in the format of another runtime.

    Args:
        result: an output folder of ``ptq quantize``, or a quantized folder of another program (GPTQ, AWQ,
            compressed-tensors); for dequantized formats also a ``.gguf`` file and whatever else ptq reads.
        format: a name of `EXPORT_FORMATS`.
        out: the new folder, which must be empty, or the ``.gguf`` file.
        overwrite: replace an earlier output of ptq there.
        embedding: of a GGUF file, the type of the embedding and the head: ``auto``, ``q6_k``, ``q8_0``, ``keep``.
        trust_remote_code: run modelling code that ships with the model.
        on_event: called at every step.

    Returns:
        The report of the exported folder, which is also in it.

    Raises:
        UsageError: an unknown format, or one that cannot carry the result.
        OutputError: the result is damaged, or the target is in use.
    """
    if format not in EXPORT_FORMATS:
        raise unknown_name("export format", format, EXPORT_FORMATS)
    if embedding not in EMBEDDING_TYPES:
        raise unknown_name("type of the embedding", embedding, EMBEDDING_TYPES)
    source, target, listener = Path(result), Path(out), on_event or ignore_events
    _check_target(source, target, overwrite, is_file=format == "gguf")
    if format in DENSE_DTYPES and not _may_be_ours(source):
        return write_dense_copy(str(result), format, target, listener, trust_remote_code=trust_remote_code)
    opened = _open(source, trust_remote_code)
    if format not in (NATIVE.name, *DENSE_DTYPES) and opened.residual_rotation is not None:
        raise UsageError(
            f"{source} rotates its residual stream at run time so that the head stays tied to the embedding, which "
            f"{format} cannot say. Quantize again with --rotate-head merged: the head gets a tensor of its own."
        )
    if format == "gguf":
        return write_gguf(opened, target, listener, embedding=embedding)
    return _write_folder(opened, FOLDER_FORMATS[format](opened, format), target, listener)


def _open(source: Path, trust_remote_code: bool) -> Result:
    """A result of ptq, or a quantized folder of another program."""
    if source.suffix == ".gguf" and source.is_file():
        raise UsageError(f"{source} is a GGUF file, which is exported to {', '.join(DENSE_DTYPES)} only.")
    kind = Result if _may_be_ours(source) else ImportedResult
    return kind(resolve_model(str(source)), trust_remote_code=trust_remote_code)


def _may_be_ours(source: Path) -> bool:
    """Whether a source is a result of ptq, an unfinished one, or a folder without any model, which `Result` refuses."""
    if source.suffix == ".gguf" or not source.is_dir():
        return False
    return (source / REPORT_NAME).is_file() or (source / STAGING).exists() or not (source / "config.json").is_file()


def _check_target(source: Path, target: Path, overwrite: bool, *, is_file: bool) -> None:
    """Refuse a target that is the source, or in use.

    Raises:
        OutputError: says which, and what to do.
    """
    if not is_file:
        check_new_folder(source, target, overwrite=overwrite)
        return
    if target.resolve() == source.resolve():
        raise OutputError(f"{target} is the result itself: name another file with -o.")
    _check_file(target, overwrite)


def _check_file(target: Path, overwrite: bool) -> None:
    if target.suffix != ".gguf" or target.is_dir():
        raise OutputError(f"a GGUF export is a file: name it with -o, e.g. {target.with_suffix('.gguf').name}.")
    if not target.resolve().parent.is_dir():
        raise OutputError(f"cannot write {target}: there is no folder {target.resolve().parent}; create it first.")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there: name another file with -o, or replace it (--overwrite).")


def _write_folder(result: Result, writer: FolderExport, out: Path, listener: Listener) -> Report:
    start = time.monotonic()
    files = result.files
    for note in writer.notes():
        listener(Event("message", note))
    check_disk(
        out, sum(path.stat().st_size for path in files) if writer.name not in DENSE_DTYPES else _dense_bytes(result)
    )
    listener(Event("blocks", text="weight files", total=len(files)))
    with CheckpointWriter(out) as checkpoint:
        for number, part in enumerate(result.parts(), start=1):
            checkpoint.write_part(part.name, writer.tensors(part))
            listener(Event("block_done", name=part.name, done=number, total=len(files)))
        found = find_companions(result.folder, out, code=result.trust_remote_code)
        copy_companions(found, checkpoint.companions)
        config, quantization, more = writer.config()
        for name, content in more.items():
            write_json(checkpoint.companions / name, content)
        report = _report(result, writer, checkpoint, time.monotonic() - start)
        report, left = add_card(checkpoint, report, result.folder)
        if left is not None:
            listener(Event("message", left))
        checkpoint.finish(config, quantization, report)
    return report


def _dense_bytes(result: Result) -> int:
    """Bytes of the dequantized model, about."""
    return int(result.report.totals["source_bytes"])


def _report(result: Result, writer: FolderExport, checkpoint: CheckpointWriter, seconds: float) -> Report:
    """The result's report with what is other in the exported folder."""
    old = result.report
    return dataclasses.replace(
        old,
        container=writer.name,
        container_reason=f"exported from {result.folder} ({old.container})",
        totals={**old.totals, "file_bytes": checkpoint.weight_bytes},
        environment={**old.environment, "export_seconds": seconds},
        warnings=(*old.warnings, *writer.notes()),
        files=checkpoint.files(),
        companions=tuple(checkpoint.companion_names()),
    )

"""`verify_files`: whether the weight files of a folder are those that its report was written for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calib.checkpoint.atomic_files import file_sha256, os_errors
from calib.checkpoint.files import INDEX_NAME, MAX_INDEX_BYTES
from calib.checkpoint.json import read_json
from calib.checkpoint.safetensors_header import check_headers
from ptq.containers.native import QUANT_METHOD, verify_config
from ptq.errors import OutputError
from ptq.report import REPORT_NAME, Report

__all__ = ["SKIP_KEY", "verify_checkpoint", "verify_files"]

SKIP_KEY = "ptq_skip_verification"
"""Attribute of a model's config that tells `verify_checkpoint` to do nothing."""
_THREADS = 4
_WAY_OUT = (
    f"Copy the file again or quantize again; if the change is wanted, remove {REPORT_NAME}, which no longer describes "
    f"the folder, or load with ptq.load(..., verify=False)."
)


def verify_files(folder: str | Path) -> int:
    """Compare size and SHA-256 of every weight file with the report; files are read in blocks of 1 MiB, some at a time.

    Args:
        folder: an output folder; without a report (a model that was saved again) the config alone is compared, with its
            own checksum.

    Returns:
        How many files were compared.

    Raises:
        OutputError: the report or the config was changed, a file is missing or differs (both hashes are named), or a
            file that takes precedence over the listed ones was added.
    """
    folder = Path(folder)
    if not (folder / REPORT_NAME).is_file():
        _verify_config(folder)
        return 0
    report = Report.load(folder)
    files = report.files
    with ThreadPoolExecutor(min(_THREADS, len(files) or 1)) as pool:  # hashing releases the interpreter
        for _ in pool.map(functools.partial(_verify, folder), files, files.values()):
            pass
    single = folder / "model.safetensors"
    if files and single.name not in files and single.exists():
        raise OutputError(f"{single} is not in {REPORT_NAME}, and would be loaded in place of its files. {_WAY_OUT}")
    if len(files) > 1:
        _verify_index(folder, files)
    _verify_rotations(folder, report)
    return len(files)


def _verify_rotations(folder: Path, report: Report) -> None:
    """Formats and rotations of the config are the report's: no tensor shows that signs or blocks are others."""
    path, config = _native_config(folder)
    schemes, layers = config.get("schemes"), config.get("layers")
    if not isinstance(schemes, dict) or not isinstance(layers, dict):
        return  # the reader of the config says what is wrong with it
    for layer in report.layers:
        scheme = schemes.get(layers.get(layer.name))
        for field in ("format", "input_rotation"):
            if isinstance(scheme, dict) and scheme.get(field) != layer.scheme.get(field):
                raise OutputError(
                    f"{path} does not match its tensors: it gives {layer.name} {field}={scheme.get(field)!r}, and "
                    f"{REPORT_NAME} says that they were written with {layer.scheme.get(field)!r}. {_WAY_OUT}"
                )


def _verify_config(folder: Path) -> None:
    path, config = _native_config(folder)
    verify_config(config, str(path))


def _native_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The path of the folder's config, and its ``quantization_config`` if that is one of the native container."""
    path = folder / "config.json"
    config = read_json(path, MAX_INDEX_BYTES, error=OutputError).get("quantization_config") if path.is_file() else None
    return path, config if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD else {}


def _verify_index(folder: Path, files: Mapping[str, Any]) -> None:
    """The index must lead to every tensor of the files: one that is left out would be drawn at random."""
    path = folder / INDEX_NAME
    listed = read_json(path, MAX_INDEX_BYTES, error=OutputError).get("weight_map")
    stored = {key: tensor.file.name for key, tensor in check_headers([folder / name for name in files]).items()}
    if listed != stored:
        wrong = sorted(stored.items() ^ listed.items())[0][0] if isinstance(listed, dict) else "weight_map"
        raise OutputError(f"{path} was changed after it was written: {wrong} is not where it says. {_WAY_OUT}")


def verify_checkpoint(config: Any, checkpoint_files: Sequence[str] | None) -> None:
    """`verify_files` for a quantizer of transformers, before weights are loaded.

    Args:
        config: of the model that is built; the attribute `SKIP_KEY` is taken off it.
        checkpoint_files: paths of its weight files, as ``from_pretrained`` hands them to quantizers.

    Raises:
        OutputError: see `verify_files`.
    """
    skip = vars(config).pop(SKIP_KEY, False)
    if checkpoint_files and not skip:
        verify_files(Path(checkpoint_files[0]).parent)


def _verify(folder: Path, name: str, stated: Mapping[str, Any]) -> None:
    path = folder / name
    if Path(name).name != name:
        raise OutputError(f"{folder / REPORT_NAME} names {name!r}, which is not a file of that folder.")
    if not path.is_file():
        raise OutputError(f"{path} is missing, and {REPORT_NAME} lists it. {_WAY_OUT}")
    with os_errors(path, "read"):
        size, digest = path.stat().st_size, file_sha256(path)
    if (size, digest) != (stated["bytes"], stated["sha256"]):
        raise OutputError(
            f"{path} was changed after it was written: {size} bytes with the SHA-256 {digest}, where {REPORT_NAME} "
            f"says {stated['bytes']} bytes with {stated['sha256']}. {_WAY_OUT}"
        )

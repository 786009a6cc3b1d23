"""Checks before the first block is computed, and where activations go."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from calib.model.input_groups import InputGroup
from calib.runner.activation_store import Offload, OffloadTarget, settle_offload
from ptq.errors import DataError, OutputError, UsageError
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.scheme import Scheme

__all__ = [
    "check_disk",
    "check_path_names",
    "check_vocabulary",
    "choose_offload_target",
    "clashing_schemes",
    "cpu_name",
    "peak_memory",
    "resolve_device",
    "stream_bytes",
]


def choose_offload_target(
    asked: Offload,
    model: Any,
    tokens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    processes: int,
    streams: int = 2,
) -> OffloadTarget:
    """Where the activations of a run go: ``none``, ``memory`` or ``disk``
    (`calib.runner.activation_store.settle_offload`)."""
    if tokens is None:
        return "none"
    return settle_offload(asked, stream_bytes(model, tokens.numel() // processes, dtype, streams), device)


def stream_bytes(model: Any, tokens: int, dtype: torch.dtype, streams: int = 2) -> int:
    """Bytes of the streams: two, and for learned methods the targets of a window."""
    return streams * tokens * int(model.config.get_text_config().hidden_size) * dtype.itemsize


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows does not have

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def cpu_name() -> str:
    """The processor and the instructions that PyTorch uses on it: both decide the last bits of sums."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def check_path_names(*paths: str | os.PathLike[str]) -> None:
    """Refuse paths whose names are not UTF-8: reports and records, which name them, are.

    Raises:
        UsageError: names the path, with what is no character escaped.
    """
    for path in (os.fspath(given) for given in paths):
        try:
            path.encode("utf-8")
        except UnicodeEncodeError as error:
            shown = path.encode("utf-8", "backslashreplace").decode("utf-8")
            raise UsageError(f"the path '{shown}' is not valid UTF-8, and the report names it: rename it.") from error


def check_disk(out: Path, needed: int) -> int:
    """Free bytes where ``out`` will be.

    Raises:
        OutputError: fewer than ``needed``.
    """
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{out} will need {needed / 1e6:,.1f} MB and {place} has {free / 1e6:,.1f} MB free: free space, or name a "
            f"folder on another disk with -o."
        )
    return free


def check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Refuse calibration tokens that the model's embedding does not have.

    Raises:
        DataError: there is such a token.
    """
    rows, largest = int(model.get_input_embeddings().weight.shape[0]), int(tokens.max())
    if largest >= rows:
        raise DataError(
            f"the calibration has token {largest}, but the model's embedding has {rows} rows: the tokenizer and the "
            f"model do not belong together."
        )


def clashing_schemes(plan: Plan, groups: Sequence[InputGroup]) -> list[str]:
    """One phrase for every set of linears that a runtime fuses into one kernel and that have different schemes.

    Such are linears of one module that read the same input (q, k and v; gate and up), and all experts of a mixture.

    Args:
        plan: of the whole model; groups: of a block, applied to every block that has linears of these names.
    """
    sets: dict[tuple[int, str], list[str]] = {}
    for number, group in enumerate(groups):
        for name in group.linears:
            key = (-1, group.experts) if group.experts else (number, name.rpartition(".")[0])
            sets.setdefault(key, []).append(name)
    clashes = []
    for block in plan.blocks:
        for names in sets.values():
            full = [f"{block}.{name}" for name in names]
            schemes = {name: plan.schemes[name] for name in full if name in plan.schemes}
            if len(set(schemes.values())) > 1:
                clashes.append(_clash(schemes))
    return clashes


def _clash(schemes: Mapping[str, Scheme | None]) -> str:
    first = next(iter(schemes.items()))
    other = next((name, scheme) for name, scheme in schemes.items() if scheme != first[1])
    shown = [f"{name} ({'full precision' if scheme is None else scheme.describe()})" for name, scheme in (first, other)]
    return f"{shown[0]} and {shown[1]} are one kernel in runtimes such as vLLM and need one scheme"


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i`` as a device that is there.

    Raises:
        UsageError: another name, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:0, cuda:1, ...") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:i.")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UsageError(f"there is no device {device!r}: this machine shows {count} CUDA device(s) to PyTorch.")
    return found

"""What every runner does the same way: read the shared tokens, time one call, leave one JSON record.

Imported by scripts that run in the peers' environments, so it needs nothing but Python, torch and safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BITS, GROUP_SIZE = 3, 64  # symmetric; what all runners quantize to


def arguments(description: str | None, methods: Sequence[str]) -> argparse.Namespace:
    """The command line of a runner."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="folder of the full model")
    parser.add_argument("tokens", help="safetensors file with input_ids int64 [sequences, seqlen]")
    parser.add_argument("out", type=Path, help="folder for the checkpoint and record.json")
    parser.add_argument("--method", choices=methods, default=methods[0])
    return parser.parse_args()


def read_tokens(path: str) -> torch.Tensor:
    """Token ids int64 ``[sequences, seqlen]``."""
    return load_file(path)["input_ids"]


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The call's result, its wall seconds and the CPU seconds of this process and its children meanwhile."""
    start, before = time.perf_counter(), _cpu_seconds()
    result = call()
    return result, {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mib() -> float:
    """Peak resident size of this process so far, MiB.

    Not from `getrusage` on Linux: what that says of a started process includes the process that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / (1 << 10)


def write_record(out: Path, name: str, method: str, packages: Sequence[str], figures: dict[str, Any]) -> None:
    """``record.json`` in ``out``: who, what, on what, how long."""
    record = {
        "peer": name,
        "method": method,
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "symmetric": True,
        **figures,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

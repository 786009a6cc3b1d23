"""The CUDA kernels as a library of C functions: compiled by nvcc for this card at the first use, kept in the cache."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ptq.runtime.extension import SOURCES, cache_folder, say_building, say_missing, sources_digest

__all__ = ["LEAST_CAPABILITY", "check", "cuda_library"]

LEAST_CAPABILITY = (8, 0)  # of integer products on tensor cores in this shape
_FILES = ("launch.cu", "uniform2.cu", "uniform3.cu", "uniform4.cu", "uniform8.cu")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "ptq_product": [_INT] * 4 + [_POINTER] * 10 + [_INT] * 7 + [_POINTER],
    "ptq_dequantize": [_INT] * 3 + [_POINTER] * 4 + [_INT] * 4 + [_POINTER],
    "ptq_quantize": [_INT] * 4 + [_POINTER] * 5 + [_INT] * 4 + [_POINTER],
}


@functools.cache
def cuda_library(capability: tuple[int, int]) -> ctypes.CDLL | str:
    """The library for cards of this compute capability, or why there is none (said in a warning).

    Sources and flags name the file, so that one that was built elsewhere can be put into the cache.
    """
    if capability < LEAST_CAPABILITY:
        return (
            f"compute capability {capability[0]}.{capability[1]} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    architecture = f"{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}"
    flags = ("-O3", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xcompiler=-fPIC")
    library = cache_folder() / f"ptq_cuda_sm{architecture}-{sources_digest(SOURCES / 'cuda', flags)}.so"
    try:
        if not library.is_file():
            _compile(library, flags)
        loaded = ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return say_missing("ptq_cuda", str(error))
    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, name).argtypes = arguments
    loaded.ptq_error.restype = ctypes.c_char_p
    return loaded


def check(library: ctypes.CDLL, code: int) -> None:
    """Raise what a function of the library returned.

    Raises:
        RuntimeError: the code is not 0.
    """
    if code:
        raise RuntimeError(f"a kernel could not be launched: {library.ptq_error(code).decode()} ({code})")


def _compile(library: Path, flags: tuple[str, ...]) -> None:
    compiler = _nvcc()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ptq_cuda-", dir=library.parent) as work:
        say_building("ptq_cuda", library.parent)
        made = Path(work) / "ptq_cuda.so"
        files = [str(SOURCES / "cuda" / file) for file in _FILES]
        command = [compiler, *flags, "--threads=0", "-diag-suppress=186", "-shared", "-cudart=static", "-o", str(made)]
        done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=work)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise RuntimeError(f"nvcc: {lines[0] if lines else f'exit code {done.returncode}'}")
        os.replace(made, library)


def _nvcc() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    beside = None if CUDA_HOME is None else Path(CUDA_HOME) / "bin" / "nvcc"
    found = str(beside) if beside is not None and beside.is_file() else shutil.which("nvcc")
    if found is None:
        raise RuntimeError("there is no nvcc (CUDA toolkit) on this machine")
    return found


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

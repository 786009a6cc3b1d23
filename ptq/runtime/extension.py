"""C++ sources of the kernels, compiled by torch's extension loader at the first use and kept in a cache.

The library is built in a temporary folder of the cache and moved to its name when it is whole, so that processes that
build at the same time, or one that is killed, leave nothing half-written. Its name is a digest of the sources, the
flags and torch's version: another torch builds anew.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["SOURCES", "cache_folder", "load_operators", "say_building", "say_missing", "sources_digest"]

SOURCES = Path(__file__).parent / "sources"
_LOG = logging.getLogger("ptq.kernels")
_FAILURES = (RuntimeError, OSError, ImportError)  # of a compiler, a linker, a disk, a loader


@functools.cache
def load_operators(name: str, sources: Sequence[str], flags: tuple[str, ...] = ()) -> str | None:
    """Load the operators that some of `SOURCES` define, compiling them if this machine has not yet.

    Args:
        name: of the operators' namespace.
        sources: files to compile; headers beside them count as part of them.
        flags: for the C++ compiler.

    Returns:
        Why there are none, in a few words, said once in a warning; ``None`` if they are there.
    """
    library = cache_folder() / f"{name}-{sources_digest(SOURCES, (torch.__version__, *flags))}.so"
    try:
        if library.is_file():
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        else:
            _build(name, sources, flags, library)
    except _FAILURES as error:
        return say_missing(name, _first_cause(error))
    return None


def say_missing(name: str, reason: str) -> str:
    """Warn that kernels could not be built, and return why, in one line."""
    warnings.warn(
        f"the {name} kernels could not be built ({reason}): the next kernel of the table in docs/kernels.md is taken, "
        "in the end the reference, which unpacks weights at every product and is slow. PTQ_KERNEL=reference says that "
        "this is meant.",
        stacklevel=3,
    )
    return reason


def say_building(name: str, folder: Path) -> None:
    """One line before a compiler runs for a while."""
    _LOG.warning("compiling the %s kernels once for this machine, a minute or less (into %s)", name, folder)


def cache_folder() -> Path:
    """``kernels`` in ``$PTQ_CACHE``, or in ``ptq`` in the user's cache folder; ``$PTQ_KERNEL_CACHE`` names another."""
    chosen = os.environ.get("PTQ_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("PTQ_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(base) if base else user / "ptq") / "kernels"


def sources_digest(folder: Path, conditions: tuple[str, ...]) -> str:
    """A short digest of all files of a folder, and of what else decides how they are compiled."""
    digest = hashlib.sha256(repr(conditions).encode())
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _build(name: str, sources: Sequence[str], flags: tuple[str, ...], library: Path) -> None:
    import ninja
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:  # an environment that is not activated: torch looks for it on the path
        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    library.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=library.parent))
    say_building(name, library.parent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the loader, about compilers that it does not know
            cpp_extension.load(  # loads it, too
                name,
                [str(SOURCES / source) for source in sources],
                extra_cflags=["-O3", "-w", *flags],
                extra_ldflags=["-fopenmp"] if "-fopenmp" in flags else [],
                build_directory=str(work),
                with_cuda=False,
                is_python_module=False,
            )
        os.replace(next(work.glob("*.so")), library)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _first_cause(error: BaseException) -> str:
    """The compiler's own sentence rather than the loader's, in one line."""
    text = str(error.__cause__ or error) if "Error building extension" not in str(error) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line.lower() and "building extension" not in line), None)
    return (told or (lines[0] if lines else type(error).__name__))[:200]

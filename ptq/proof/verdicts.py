"""Verdicts on whether an output would load, each found once: remembered in this process and in the user's cache.

A verdict depends on the structure of a model and of its quantization, on the versions of the libraries that load it,
and on our own code; its key is a hash of all of these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import calib
import ptq.scheme
from calib.checkpoint.atomic_files import write_json
from calib.checkpoint.reader import ModelSource
from calib.errors import PtqError
from ptq.scheme import KeyValueScheme, Scheme

__all__ = ["Verdict", "recall", "remember", "structure_key"]

_LIBRARIES = ("transformers", "torch", "compressed-tensors", "safetensors", "accelerate")
_NOT_STRUCTURE = ("_name_or_path", "transformers_version")
_remembered: dict[str, Verdict] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of loading a skeleton of an output.

    Args:
        loads: whether it loads; ``None`` if it could not be tried.
        problem: why not, in one line.
        forward: ``compared`` (its logits are those of the unpacked weights), ``ran`` or ``not run``.
        shrunk: whether the skeleton was a smaller model than the one that is quantized.
        blocks: how many blocks it had.
    """

    loads: bool | None
    problem: str | None = None
    forward: str = "not run"
    shrunk: bool = False
    blocks: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def structure_key(
    source: ModelSource,
    schemes: Mapping[str, Scheme | None],
    key_values: KeyValueScheme | None,
    form: str,
    trust_remote_code: bool,
) -> str:
    """The hash under which a verdict is remembered.

    Args:
        source: the model.
        schemes: of all linears in its blocks by full name.
        key_values: how keys and values are rounded.
        form: ``compressed-tensors`` or ``native``.
        trust_remote_code: whether code that ships with the model runs; its files are part of the key.
    """
    config = {**source.skeleton.config.to_dict(), **source.config_changes}
    code = sorted(source.folder.glob("*.py")) if trust_remote_code and source.folder is not None else []
    facts = {
        "config": {name: value for name, value in config.items() if name not in _NOT_STRUCTURE},
        "class": type(source.skeleton).__qualname__,
        "in memory": source.folder is None,
        "dtype": str(source.dtype),
        "schemes": {name: None if scheme is None else dataclasses.asdict(scheme) for name, scheme in schemes.items()},
        "key values": None if key_values is None else key_values.to_dict(),
        "format": form,
        "versions": {name: version(name) for name in _LIBRARIES},
        "code": [_own_code(), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in code)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _own_code() -> str:
    """A hash over the source files of this package and of ``calib``."""
    digest = hashlib.sha256()
    for folder in (Path(ptq.scheme.__file__).parent, Path(calib.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def recall(key: str) -> Verdict | None:
    """The verdict under that key, from this process or from the cache; damaged files are passed over."""
    if key in _remembered:
        return _remembered[key]
    try:
        return Verdict(**json.loads(_file(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RuntimeError):
        return None


def remember(key: str, verdict: Verdict) -> None:
    """Keep a verdict: one that loads for later runs, too; a failure may have been this environment's and is tried anew.

    A cache that cannot be written costs the next run some seconds and is not worth a word.
    """
    _remembered[key] = verdict
    if not verdict.loads:
        return
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, verdict.to_dict(), shared=True)
    except (OSError, PtqError, RuntimeError):
        return


def _file(key: str) -> Path:
    """``proofs/KEY.json`` in ``$PTQ_CACHE``, or in ``ptq`` in the user's cache folder."""
    chosen = os.environ.get("PTQ_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"
    return root / "proofs" / f"{key}.json"

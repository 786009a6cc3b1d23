"""The base's results on disk: computed once, read by every model that is compared with it.

    ROOT/<name>-<key>/            one base, loaded one way; the key hashes its place, dtype and device
        base.json                 what it is: fingerprints, `ModelInfo`, environment
        text-<key>/               one text, cut one way, with ``top_k`` entries kept
            windows.json          how many windows there are
            00000.safetensors     what is kept of a window (`evals.texts.kl.TopKLogprobs`)
            result.json           its `TextResult`; there when the windows are complete
        task-<key>.json           the `TaskResult` of a task

Every file is renamed into place when it is whole, so a run that was killed goes on where it stopped. When the base's
fingerprint is another than the one that is stored, the folder is emptied, and the store says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.checkpoint.atomic_files import os_errors, write_file, write_json
from calib.errors import OutputError
from evals.texts.kl import DRAWS, TopKLogprobs

__all__ = ["BaseStore", "TextStore", "default_cache"]

LAYOUT = 2
_SMALL_VOCABULARY = 1 << 16
_CARD = "base.json"


def default_cache() -> Path:
    """``$PTQ_CACHE``, or ``ptq`` in the user's cache folder."""
    chosen = os.environ.get("PTQ_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"


@contextlib.contextmanager
def _cache_errors(folder: Path, verb: str) -> Iterator[None]:
    """Errors of the cache name the way to choose another one."""
    try:
        with os_errors(folder, verb):
            yield
    except OutputError as error:
        raise OutputError(
            f"{error} The base's results are kept there; --cache DIR or $PTQ_CACHE names another place."
        ) from error


class BaseStore:
    """Results of one base.

    Args:
        root: folder of all bases.
        source: the base's path or name.
        loaded: what decides its numbers besides its weights (dtype, device); JSON data.
        fingerprint: of its weights as they lie on disk or in memory now.

    Raises:
        OutputError: the folder cannot be read or written.
    """

    def __init__(self, root: Path, source: str, loaded: Mapping[str, Any], fingerprint: str) -> None:
        key = _key({"source": source, "loaded": dict(loaded), "layout": LAYOUT})
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source).name)[-40:].strip("-.") or "base"
        self.folder = root / f"{name}-{key}"
        self.fingerprint = fingerprint
        self.notes: tuple[str, ...] = ()
        with _cache_errors(root, "create"):  # before the base is loaded and run
            root.mkdir(parents=True, exist_ok=True)
        found = _read_json(self.folder / _CARD)
        if found is not None and not {"model", "tokenizer_hash", "environment"} <= set(found):
            found = None  # damaged
        unknown = found is None and any(self.folder.glob("t*-*"))  # texts and tasks, but of which weights?
        if unknown or (found is not None and found.get("fingerprint") != fingerprint):
            self.notes = (f"{source} is not what it was when its results were kept: they are computed again",)
            with _cache_errors(self.folder, "empty"):
                shutil.rmtree(self.folder)
            found = None
        self.card: dict[str, Any] | None = found

    def describe(self, card: Mapping[str, Any]) -> None:
        """Keep what the base is, so that it need not be loaded again."""
        with _cache_errors(self.folder, "create"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.card = dict(card) | {"fingerprint": self.fingerprint}
            write_json(self.folder / _CARD, self.card, shared=True)

    def text(self, question: Mapping[str, Any]) -> TextStore:
        """Where a text's windows are; ``question`` is everything that decides them."""
        return TextStore(self.folder / f"text-{_key(question)}")

    def task(self, question: Mapping[str, Any]) -> ResultFile:
        """Where a task's result is."""
        return ResultFile(self.folder / f"task-{_key(question)}.json")


class ResultFile:
    """JSON data that is there or not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """What was written, or ``None``; a damaged file counts as missing."""
        return _read_json(self.path)

    def write(self, result: Mapping[str, Any]) -> None:
        """Keep a result."""
        with _cache_errors(self.path.parent, "create"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, result, shared=True)


class TextStore(ResultFile):
    """What is kept of the base's predictions for the windows of a text (`evals.texts.scoring.Base`)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "result.json")
        self.folder = folder
        self._count = folder / "windows.json"

    def begin(self, windows: int) -> None:
        """Say how many windows there will be."""
        with _cache_errors(self.folder, "create"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._count, {"windows": windows}, shared=True)

    def missing(self) -> list[int]:
        """Windows that are not there yet."""
        return [index for index in range(self._windows()) if not self._file(index).is_file()]

    def complete(self) -> bool:
        """Whether all windows are there."""
        return self._windows() > 0 and not self.missing()

    def nll(self, index: int) -> Tensor:
        """``-ln p`` of the true tokens of a window, float64."""
        return self.window(index).nll.double()

    def _windows(self) -> int:
        found = _read_json(self._count)
        count = 0 if found is None else found.get("windows", 0)
        return count if isinstance(count, int) else 0

    def require_space(self, positions: int, top_k: int | None, vocab: int) -> None:
        """Refuse before the work if the disk cannot take it.

        Raises:
            OutputError: names the bytes that are needed and free, and what to do.
        """
        needed = positions * _bytes_each(top_k, vocab)
        with os_errors(self.folder, "look at"):
            free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise OutputError(
                f"the base's predictions need {needed / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are free. "
                "Give another folder (--cache), fewer tokens (--max-tokens, --limit) or a smaller --base-top-k."
            )

    def write_window(self, index: int, kept: TopKLogprobs) -> None:
        """Keep a window's predictions."""
        values = {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for name in ("ids", "drawn"):
            if name in tensors:
                tensors[name] = _small(tensors[name], kept.vocab)
        tensors["top"] = kept.top.to(torch.int32)
        metadata = {"vocab": str(kept.vocab)}
        path = self._file(index)
        with _cache_errors(path, "write"):
            write_file(path, lambda temporary: save_file(_contiguous(tensors), temporary, metadata), shared=True)

    def window(self, index: int) -> TopKLogprobs:
        """What `write_window` kept.

        Raises:
            OutputError: the file is missing or damaged.
        """
        path = self._file(index)
        try:
            found: dict[str, Any] = load_file(path)
            for name in ("ids", "drawn", "top"):
                if name in found:
                    found[name] = found[name].to(torch.int64)
            nothing: dict[str, Any] = dict.fromkeys(("ids", "drawn", "drawn_log_p"))
            return TopKLogprobs(**nothing | found, vocab=_vocab(path))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise OutputError(
                f"the base's predictions in {path} are damaged ({error}); delete {self.folder} and run again."
            ) from error

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


def _vocab(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["vocab"])


def _small(ids: Tensor, vocab: int) -> Tensor:
    return ids.to(torch.uint16 if vocab <= _SMALL_VOCABULARY else torch.int32)


def _bytes_each(top_k: int | None, vocab: int) -> int:
    """Bytes that are kept of one prediction."""
    if top_k is None or top_k >= vocab:
        return 4 * vocab + 20
    return (top_k + DRAWS) * (4 + (2 if vocab <= _SMALL_VOCABULARY else 4)) + 20


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}


def _key(question: Mapping[str, Any]) -> str:
    line = json.dumps(dict(question), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

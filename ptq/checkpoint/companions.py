"""The files that go along from a model's folder to the output: everything that is neither weights nor their index.

Processor and tokenizer files, chat templates, licences and whatever else a model needs are found by exclusion, so that
no file is lost because its name is not in a list. What stays behind, each for its reason:

* weights in any format and their indexes; ``config.json``, which is written anew;
* the model card (``README*``): it describes other weights, and its figures would be read as those of the output;
* files that describe how the source was quantized;
* hidden files, and links that lead out of the folder (of a snapshot in the hub's cache: out of its repository);
* Python files, unless the user allowed the model's code to run;
* a file of more than `MAX_FILE` bytes; a sub-folder of more than `MAX_FOLDER` bytes, `MAX_FILES` files or `MAX_DEPTH`
  levels, and one that holds weights: that is another model, or this one in another format.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from calib.checkpoint.atomic_files import os_errors
from calib.checkpoint.files import WEIGHT_SUFFIXES
from ptq.report import REPORT_NAME

__all__ = ["MAX_DEPTH", "MAX_FILE", "MAX_FILES", "MAX_FOLDER", "Companions", "copy_companions", "find_companions"]

MAX_FILE = 256 << 20
MAX_FOLDER = 64 << 20
MAX_FILES = 256
MAX_DEPTH = 4
_OURS = ("config.json", REPORT_NAME)
_OTHER_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_OTHER_FORMATS = ("original",)  # folders with what belongs to weights in another format, even where these are missing
_SHOWN = 5  # names in a sentence


@dataclasses.dataclass(frozen=True)
class Companions:
    """What goes along from a folder.

    Args:
        files: the file to read by the name to write, relative to the output folder.
        left: names of what stays behind, by the reason. Weights and hidden files of the folder itself are not named.
    """

    files: dict[str, Path]
    left: dict[str, list[str]]

    def notes(self) -> list[str]:
        """A sentence for the user per reason."""
        return [f"not copied, {reason}: {_first(names)}" for reason, names in self.left.items()]


def find_companions(folder: Path, out: Path, *, code: bool = False, text_only: bool = False) -> Companions:
    """The companions in a model's folder.

    Args:
        folder: the model's folder; links in it are followed as long as they stay in it.
        out: the output folder, which may lie in ``folder``.
        code: whether the user allowed the model's Python files to run.
        text_only: leave out the processors of images, video and sound.

    Raises:
        OutputError: the folder cannot be read.
    """
    with os_errors(folder, "read"):
        search = _Search(folder.resolve(), out.resolve(), code, text_only)
        search.top()
    return Companions(search.files, dict(search.left))


def copy_companions(companions: Companions, target: Path) -> None:
    """Copy the files below ``target``.

    Raises:
        OutputError: a file cannot be copied.
    """
    for name, path in companions.files.items():
        with os_errors(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


class _Search:
    """One search through a folder; fills ``files`` and ``left``."""

    def __init__(self, root: Path, out: Path, code: bool, text_only: bool) -> None:
        self.root, self.out, self.code, self.text_only = root, out, code, text_only
        self.allowed = [root, *_blobs(root)]
        self.files: dict[str, Path] = {}
        self.left: defaultdict[str, list[str]] = defaultdict(list)

    def top(self) -> None:
        for path in sorted(self.root.iterdir()):
            if _hidden(path):
                continue
            real = self._followed(path)
            if real is None:
                self.left["a link out of the folder or to nothing"].append(path.name)
            elif real.is_dir():
                self._folder(path, real)
            elif real.is_file():
                reason = self._reason(path, real)
                if reason is None:
                    self.files[path.name] = real
                elif reason:
                    self.left[reason].append(path.name)
            else:
                self.left["neither a file nor a folder"].append(path.name)

    def _reason(self, path: Path, real: Path) -> str | None:
        """Why a file of the folder itself stays behind: empty where that needs no word, ``None`` if it does not."""
        name = path.name.casefold()
        if name in _OURS or name.endswith(".index.json") or _is_weights(path) or _is_weights(real):
            return ""
        if name.startswith("readme"):
            return "it describes the weights in full precision"
        if name in _OTHER_QUANTIZATION:
            return "it describes how the source was quantized"
        if name.endswith(".py") and not self.code:
            return "Python code goes along only with --trust-remote-code"
        if self.text_only and name.endswith("processor_config.json"):
            return "the output reads text only"
        return f"larger than {MAX_FILE >> 20} MiB" if real.stat().st_size > MAX_FILE else None

    def _folder(self, path: Path, real: Path) -> None:
        """Take a sub-folder, or name the reason why not."""
        if real == self.out or path.name == "__pycache__":
            return
        if path.name.casefold() in _OTHER_FORMATS:
            self.left["it belongs to weights in another format"].append(f"{path.name}/")
            return
        found: dict[str, Path] = {}
        size = 0
        for name, file in self._below(path.name, real, 1):
            if file is None:
                self.left["a link out of the folder or to nothing"].append(name)
                continue
            if _is_weights(Path(name)) or _is_weights(file):
                self.left["it holds weights"].append(f"{path.name}/")
                return
            size += file.stat().st_size
            if len(found) >= MAX_FILES or size > MAX_FOLDER or name.count("/") > MAX_DEPTH:
                limit = f"more than {MAX_FOLDER >> 20} MiB, {MAX_FILES} files or {MAX_DEPTH} levels"
                self.left[limit].append(f"{path.name}/")
                return
            if name.endswith(".py") and not self.code:
                self.left["Python code goes along only with --trust-remote-code"].append(name)
            else:
                found[name] = file
        self.files |= found

    def _below(self, name: str, folder: Path, depth: int) -> Iterator[tuple[str, Path | None]]:
        """Files below a sub-folder: name in the output, file; ``None`` for a link that is not followed."""
        for path in sorted(folder.iterdir()):
            below = f"{name}/{path.name}"
            if _hidden(path) or path.name == "__pycache__":
                continue
            real = self._followed(path)
            if real is not None and real.is_dir():
                loops = folder.is_relative_to(real)  # a link to a folder above itself
                if real != self.out and not loops and depth <= MAX_DEPTH:
                    yield from self._below(below, real, depth + 1)
            elif real is None or real.is_file():
                yield below, real

    def _followed(self, path: Path) -> Path | None:
        """What a path stands for; ``None`` for a link that leads to nothing or out of the folder."""
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):  # nothing there, or a link to itself
            return None
        return real if any(real.is_relative_to(root) for root in self.allowed) else None


def _blobs(root: Path) -> list[Path]:
    """Where the files of a snapshot in the hub's cache lie: ``snapshots/REVISION`` links to ``blobs`` beside it."""
    blobs = root.parent.parent / "blobs"
    return [blobs] if root.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else []


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _is_weights(path: Path) -> bool:
    """Whether a file's name is that of weights in some format."""
    return path.suffix.casefold() in WEIGHT_SUFFIXES or ".onnx" in path.name.casefold()


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

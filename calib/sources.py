"""Names of text -> one string. Files, hub data sets, the manual inside CPython; nothing here knows of tokens.

    notes.txt            a UTF-8 file, bytes unchanged          docs.jsonl          one JSON object a line, its ``text``
    wikitext2[:split]    WikiText-2 raw, train by default       c4[:split]          C4 English, train by default
    repo:split:field     any hub data set                       repo:config:split:field
    pydoc, pydoc:eval    first 80 %, last 20 % of the reference manual that every CPython carries
    SOURCE@0:0.8         the first 80 % of the characters of any of these

Documents are joined by an empty line, which is the convention of the quantization literature for WikiText-2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calib.errors import DataError, UsageError, unknown_name

__all__ = ["PYDOC_CALIBRATION", "SELF", "SOURCE_NAMES", "Text", "read_text"]

SELF = "self"
PYDOC_CALIBRATION = 0.8
SEPARATOR = "\n\n"
SOURCE_NAMES = (
    "c4",
    "c4:validation",
    "pydoc",
    "pydoc:eval",
    SELF,
    "wikitext2",
    "wikitext2:test",
    "wikitext2:validation",
)

_SLICE = re.compile(r"(?P<name>.+)@(?P<start>[0-9.]+):(?P<end>[0-9.]+)")
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_OFFLINE = (
    "Without a network, give a text file or 'pydoc' (Python's own manual); to calibrate, 'self' (sampled) also serves."
)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Args:
        text: the characters.
        source: the name it was asked for by.
        notes: what a reader of the record must know (a cut, a version).
    """

    text: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def read_text(source: str, *, split: tuple[float, float] = (0.0, 1.0), limit: int | None = None) -> Text:
    """Read the text that ``source`` names (the module's table).

    Args:
        source: a path or a name, with ``@start:end`` for a part of its characters.
        split: part of the characters that remain after the slice in the name, as fractions.
        limit: a hub data set that streams is read no further than this many characters; nothing else is cut.

    Raises:
        UsageError: no such name, or a slice that is not ``0 <= start < end <= 1``.
        DataError: a file or a data set that is missing, unreadable or without the field.
    """
    name, part = _parse_slice(source)
    text, notes = _read(name, limit)
    for start, end in (part, _checked_part(split, source)):
        text = text[round(start * len(text)) : round(end * len(text))]
    return Text(text, source, notes)


def _parse_slice(source: str) -> tuple[str, tuple[float, float]]:
    found = _SLICE.fullmatch(source)
    if found is None or Path(source).is_file():
        return source, (0.0, 1.0)
    try:
        part = float(found["start"]), float(found["end"])
    except ValueError as error:
        raise UsageError(f"the slice of {source!r} is not two fractions; write for example NAME@0:0.8.") from error
    return found["name"], _checked_part(part, source)


def _checked_part(part: tuple[float, float], source: str) -> tuple[float, float]:
    start, end = part
    if not 0.0 <= start < end <= 1.0:
        raise UsageError(
            f"the part {start:g}:{end:g} of {source!r} must satisfy 0 <= start < end <= 1, as in NAME@0:0.8."
        )
    return part


def _read(name: str, limit: int | None) -> tuple[str, tuple[str, ...]]:
    path = Path(name)
    if path.is_file():
        return _read_file(path), ()
    if path.is_dir():
        raise DataError(f"the text source {name!r} is a folder; give one text file or one .jsonl file.")
    if name in ("pydoc", "pydoc:eval"):
        return _read_pydoc(evaluation=name == "pydoc:eval")
    if name == SELF:
        raise UsageError("the source 'self' is sampled from the model: it has no text to read, split or slice.")
    request = _hub_request(name)
    if request is not None:
        return _read_hub(name, *request, limit)
    if path.suffix in (".txt", ".jsonl", ".json", ".md") or path.parent != Path("."):
        raise DataError(
            f"there is no file {name!r} (looked in {Path.cwd()}). Check the path; a hub data set is written "
            "repo:split:field, for example 'Salesforce/wikitext:wikitext-2-raw-v1:test:text'."
        )
    raise unknown_name("text source", name, (*SOURCE_NAMES, "FILE.txt", "FILE.jsonl", "repo:split:field"))


def _read_file(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from error
    return SEPARATOR.join(_jsonl_texts(path, text)) if path.suffix == ".jsonl" else text


def _jsonl_texts(path: Path, text: str) -> Iterator[str]:
    """The ``text`` fields, in order. Lines end at a line feed only: JSON strings may hold other separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{path}, line {number} is not a JSON object with a string field 'text': {line[:80]!r}.")
        yield row["text"]


def _read_pydoc(evaluation: bool) -> tuple[str, tuple[str, ...]]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data.topics; give a text file instead of 'pydoc'.") from error
    text = SEPARATOR.join(topics[name] for name in sorted(topics))
    cut = round(PYDOC_CALIBRATION * len(text))
    return text[cut:] if evaluation else text[:cut], (f"reference manual of Python {platform.python_version()}",)


def _hub_request(name: str) -> tuple[dict[str, Any], str] | None:
    """What `datasets.load_dataset` is to be asked for, and the field with the text."""
    base, _, split = name.partition(":")
    if base == "wikitext2" and split in ("", "train", "test", "validation"):
        return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split or "train"}, "text"
    if base == "c4" and split in ("", *_C4_FILES):
        split = split or "train"
        return {
            "path": "allenai/c4",
            "data_files": {split: _C4_FILES[split]},
            "split": split,
            "streaming": True,
        }, "text"
    parts = name.split(":")
    if len(parts) not in (3, 4) or not all(parts):
        return None
    request = {"path": parts[0], "split": parts[-2], "streaming": True}
    return request | ({"name": parts[1]} if len(parts) == 4 else {}), parts[-1]


def _read_hub(source: str, request: dict[str, Any], field: str, limit: int | None) -> tuple[str, tuple[str, ...]]:
    import datasets  # imported here: it takes a second, and most runs do not need it

    try:
        rows = datasets.load_dataset(**request)
        texts, cut = _take(rows, source, field, limit if request.get("streaming") else None)
    except DataError:
        raise
    except Exception as error:  # the library and what it reads through raise errors of many unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise DataError(
            f"cannot read the hub data set {source!r} ({type(error).__name__}: {reason}). {_OFFLINE}"
        ) from error
    notes = (f"hub data set {request['path']}, split {request['split']}",)
    return SEPARATOR.join(texts), notes + ((f"the first {len(texts)} documents only",) if cut else ())


def _take(rows: Iterable[Mapping[str, Any]], source: str, field: str, limit: int | None) -> tuple[list[str], bool]:
    """Texts until ``limit`` characters are reached, and whether that ended the reading."""
    texts: list[str] = []
    characters = 0
    for row in rows:
        if not isinstance(row.get(field), str):
            raise DataError(f"{source!r} has no text field {field!r}; its fields: {', '.join(map(str, row))}.")
        texts.append(row[field])
        characters += len(row[field]) + len(SEPARATOR)
        if limit is not None and characters >= limit:
            return texts, True
    return texts, False

"""Names of text -> one string. Files, hub data sets, the manual inside CPython; nothing here knows of tokens.

    notes.txt            a UTF-8 file, bytes unchanged          docs.jsonl          rows: one JSON object per line
    docs.json            rows: one array, or one per line       docs.parquet        rows
    docs.jsonl:field     the column ``field`` of the rows
    wikitext2[:split]    WikiText-2 raw, train by default       c4[:split]          C4 English, train by default
    repo:split:field     any hub data set                       repo:config:split:field
    pydoc, pydoc:eval    first 80 %, last 20 % of the reference manual that every CPython carries
    SOURCE@0:0.8         the first 80 % of the characters of any of these

A row is its ``text``, or its ``messages`` as the model's chat template writes them (`calib.data.chat`). Documents are
joined by an empty line, which is the convention of the quantization literature for WikiText-2; conversations follow
each other as their template ends and begins them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.checkpoint.hub import hub_access, no_hub
from calib.data.chat import RowReader
from calib.data.rows import ROW_SUFFIXES, decoded, file_rows
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
        templated: a chat template wrote it, so that it holds the model's special tokens already.
    """

    text: str
    source: str
    notes: tuple[str, ...] = ()
    templated: bool = False

    @property
    def sha256(self) -> str:
        """Hash of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a name stands for, before any part of it is taken."""

    text: str
    notes: tuple[str, ...] = ()
    templated: bool = False


def read_text(
    source: str,
    *,
    split: tuple[float, float] = (0.0, 1.0),
    limit: int | None = None,
    rows: RowReader | None = None,
) -> Text:
    """Read the text that ``source`` names (the module's table).

    Args:
        source: a path or a name, with ``@start:end`` for a part of its characters.
        split: part of the characters that remain after the slice in the name, as fractions.
        limit: a hub data set that streams is read no further than this many characters; nothing else is cut.
        rows: how rows become text; without it conversations are refused for want of a chat template.

    Raises:
        UsageError: no such name, or a slice that is not ``0 <= start < end <= 1``.
        DataError: a file or a data set that is missing, unreadable or without the field.
    """
    name, part = _parse_slice(source)
    found = _read(name, limit, rows or RowReader())
    text = found.text
    for start, end in (part, _checked_part(split, source)):
        text = text[round(start * len(text)) : round(end * len(text))]
    return Text(text, source, found.notes, found.templated)


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


def _read(name: str, limit: int | None, rows: RowReader) -> _Found:
    path, column = _path_and_column(name)
    if path.is_file():
        return _read_file(path, column, rows)
    if path.is_dir():
        raise DataError(f"the text source {name!r} is a folder; give one file: .txt, .jsonl, .json or .parquet.")
    if name in ("pydoc", "pydoc:eval"):
        return _require_plain(_read_pydoc(evaluation=name == "pydoc:eval"), name, rows)
    if name == SELF:
        raise UsageError("the source 'self' is sampled from the model: it has no text to read, split or slice.")
    request = _hub_request(name)
    if request is not None:
        return _read_hub(name, *request, limit, rows)
    if path.suffix in (".txt", ".md", *ROW_SUFFIXES) or path.parent != Path("."):
        raise DataError(
            f"there is no file {name!r} (looked in {Path.cwd()}). Check the path; a hub data set is written "
            "repo:split:field, for example 'Salesforce/wikitext:wikitext-2-raw-v1:test:text'."
        )
    raise unknown_name(
        "text source", name, (*SOURCE_NAMES, "FILE.txt", "FILE.jsonl", "FILE.json", "FILE.parquet", "repo:split:field")
    )


def _path_and_column(name: str) -> tuple[Path, str | None]:
    """The path in ``FILE.jsonl:column``; a name that is itself a file is never taken apart."""
    path, (base, colon, column) = Path(name), name.rpartition(":")
    if colon and column and Path(base).suffix.lower() in ROW_SUFFIXES and not path.is_file() and Path(base).is_file():
        return Path(base), column
    return path, None


def _read_file(path: Path, column: str | None, rows: RowReader) -> _Found:
    if path.suffix.lower() not in ROW_SUFFIXES:
        return _require_plain(_Found(decoded(path)), str(path), rows)
    hint = f", or name another column: {path}:COLUMN." if column is None else "."
    found = [rows.text(row, where, column, hint) for where, row in file_rows(path)]
    if not found:
        raise DataError(f"{path} has no rows: {'an array of' if path.suffix == '.json' else ''} objects are expected.")
    return _joined(found)


def _require_plain(found: _Found, name: str, rows: RowReader) -> _Found:
    """A text that does not come in rows, unless conversations alone were asked for."""
    if rows.template == "always":
        raise UsageError(
            f"{name!r} is a text without rows, and --calib-template always takes rows of messages only; "
            "leave it at auto for texts."
        )
    return found


def _joined(texts: Sequence[tuple[str, bool]], notes: tuple[str, ...] = ()) -> _Found:
    """Rows as one text; conversations need nothing between them, their template ends and begins each."""
    chats = sum(templated for _, templated in texts)
    separator = "" if chats == len(texts) else SEPARATOR
    told = (f"{chats} conversations, written by the model's chat template",) if chats else ()
    return _Found(separator.join(text for text, _ in texts), notes + told, chats > 0)


def _read_pydoc(evaluation: bool) -> _Found:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data.topics; give a text file instead of 'pydoc'.") from error
    text = SEPARATOR.join(topics[name] for name in sorted(topics))
    cut = round(PYDOC_CALIBRATION * len(text))
    note = f"reference manual of Python {platform.python_version()}"
    return _Found(text[cut:] if evaluation else text[:cut], (note,))


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


def _read_hub(source: str, request: dict[str, Any], field: str, limit: int | None, reader: RowReader) -> _Found:
    import datasets  # imported here: it takes a second, and most runs do not need it

    with hub_access() as unreachable:
        try:
            rows = datasets.load_dataset(**request)
            texts, cut = _take(rows, source, field, limit if request.get("streaming") else None, reader)
        except (DataError, UsageError):
            raise
        except Exception as error:  # the library and what it reads through raise errors of many unrelated classes
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            why = f"{type(error).__name__}: {reason}" if unreachable is None else no_hub(unreachable, "it")
            raise DataError(f"cannot read the hub data set {source!r} ({why}). {_OFFLINE}") from error
    notes = (f"hub data set {request['path']}, split {request['split']}",)
    return _joined(texts, notes + ((f"the first {len(texts)} documents only",) if cut else ()))


def _take(
    rows: Iterable[Mapping[str, Any]], source: str, field: str, limit: int | None, reader: RowReader
) -> tuple[list[tuple[str, bool]], bool]:
    """Texts until ``limit`` characters are reached, and whether that ended the reading."""
    texts: list[tuple[str, bool]] = []
    characters = 0
    for number, row in enumerate(rows, start=1):
        texts.append(reader.text(row, f"{source!r}, row {number}", field, "; name its column last in the source."))
        characters += len(texts[-1][0]) + len(SEPARATOR)
        if limit is not None and characters >= limit:
            return texts, True
    return texts, False

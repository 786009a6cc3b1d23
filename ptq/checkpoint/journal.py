"""`Journal`: what is finished of a run, one line a part, so that the same command can go on after a crash.

``journal.jsonl`` lies in the staging folder. Every line is a JSON object with ``kind`` and ``check``, the first 16 hex
digits of the SHA-256 of the line's other fields (compact JSON, sorted keys), and is synced before the run goes on:

    {"kind": "header", "version": 1, "conditions": {...}}              everything that decides the bytes
    {"kind": "part", "name", "file", "bytes", "sha256", "payload"}     a shard that is whole on the disk
    {"kind": "finishing", "names": [...]}                              the shards are moving to these names

A crash tears the end of the file at most, which is dropped. Damage with a whole line after it is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.checkpoint.atomic_files import os_errors, sync, write_file
from ptq.errors import OutputError
from ptq.report import canonical_json

__all__ = [
    "JOURNAL_NAME",
    "JOURNAL_VERSION",
    "MAY_CHANGE",
    "FinishedPart",
    "Journal",
    "changed_conditions",
    "flatten",
]

JOURNAL_NAME = "journal.jsonl"
JOURNAL_VERSION = 1
MAY_CHANGE = ("offload", "model.source")
"""Conditions, or first parts of their dotted names, that a resumed run may change: they do not decide any byte.

``offload`` is where activations are kept, ``model.source`` the path of the model (its fingerprint has to stay).
"""
_CHECK_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class FinishedPart:
    """A shard that is on the disk, and what the caller wants to know of it after a crash.

    Args:
        name: the caller's name, e.g. that of a block.
        file: the shard's name in the staging folder; bytes: its size; sha256: its hash in hex.
        payload: plain data, as JSON gives it back (tuples become lists).
    """

    name: str
    file: str
    bytes: int
    sha256: str
    payload: dict[str, Any]


class Journal:
    """An open journal; `create` or `read` makes one.

    Args:
        path: the file.
        conditions: of the header; ``None`` for a run that cannot be resumed.
        parts: in the order of the file.
        names: final names of the shards once they began to move, else ``None``.
        ends: byte offset of the end of every line, the header's first.
        torn: whether a torn last line was dropped.
    """

    def __init__(
        self,
        path: Path,
        conditions: dict[str, Any] | None,
        parts: list[FinishedPart],
        names: list[str] | None,
        ends: list[int],
        torn: bool = False,
    ) -> None:
        self.path, self.conditions, self.parts, self.names, self.torn = path, conditions, parts, names, torn
        self._ends = ends

    @classmethod
    def create(cls, folder: Path, conditions: Mapping[str, Any] | None) -> Journal:
        """A journal with a header and no parts, on the disk.

        Raises:
            OutputError: it cannot be written.
            TypeError, ValueError: a condition is not plain data.
        """
        path = folder / JOURNAL_NAME
        plain = None if conditions is None else _plain(conditions)
        line = _encode({"kind": "header", "version": JOURNAL_VERSION, "conditions": plain})
        write_file(path, lambda temporary: temporary.write_bytes(line))
        return cls(path, plain, [], None, [len(line)])

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in ``folder``, cut back to its last whole line; ``None`` where there is none, or no whole line.

        Raises:
            OutputError: a line before the last is damaged, a newer version wrote it, or it cannot be read.
        """
        path = folder / JOURNAL_NAME
        with os_errors(path, "read"):
            data = path.read_bytes() if path.exists() else b""
        *whole, tail = data.split(b"\n")
        records, size = _decode(path, [line + b"\n" for line in whole] + ([tail] if tail else []))
        if not records:
            return None
        journal = _from_records(path, records)
        if size < len(data):
            journal.torn = True
            journal._cut(size)
        return journal

    @classmethod
    def read_only(cls, folder: Path) -> Journal | None:
        """`read` without cutting anything off: for a look at what may belong to a run that is under way.

        Raises:
            OutputError: see `read`.
        """
        path = folder / JOURNAL_NAME
        with os_errors(path, "read"):
            data = path.read_bytes() if path.exists() else b""
        *whole, _ = data.split(b"\n")
        records, _size = _decode(path, [line + b"\n" for line in whole])
        return _from_records(path, records) if records else None

    def add_part(self, part: FinishedPart) -> None:
        """Note a part whose shard is whole on the disk.

        Raises:
            OutputError: the line cannot be written; the journal is as before.
            TypeError, ValueError: the payload is not plain data.
        """
        part = dataclasses.replace(part, payload=_plain(part.payload))
        self._append({"kind": "part", **dataclasses.asdict(part)})
        self.parts.append(part)

    def add_finishing(self, names: Sequence[str]) -> None:
        """Note that the shards begin to move to ``names`` in the output folder.

        Raises:
            OutputError: the line cannot be written.
        """
        self._append({"kind": "finishing", "names": list(names)})
        self.names = list(names)

    def keep_parts(self, count: int) -> None:
        """Forget all parts after the first ``count``, and that the shards began to move.

        Raises:
            OutputError: the file cannot be cut.
        """
        self._cut(self._ends[count])
        del self._ends[count + 1 :], self.parts[count:]
        self.names = None

    def _append(self, record: Mapping[str, Any]) -> None:
        line = _encode(record)
        with os_errors(self.path), self.path.open("ab", buffering=0) as file:
            try:
                if file.write(line) != len(line):
                    raise OSError("the line was written in part only")
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(self._ends[-1])
                raise
        self._ends.append(self._ends[-1] + len(line))

    def _cut(self, size: int) -> None:
        with os_errors(self.path):
            os.truncate(self.path, size)
            sync(self.path)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings in mappings as one level of dotted names, e.g. ``{"recipe.scheme.bits": 3}``; the way to conditions.

    Lists and empty mappings are values.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for every condition that differs and is not in `MAY_CHANGE`: name, old value, new value."""
    new = _plain(new)
    free = tuple(f"{name}." for name in MAY_CHANGE)
    differing = [key for key in sorted(old.keys() | new.keys()) if _shown(old, key) != _shown(new, key)]
    return [
        f"{key} was {_shown(old, key)} and is now {_shown(new, key)}"
        for key in differing
        if not f"{key}.".startswith(free)
    ]


def _shown(conditions: Mapping[str, Any], key: str) -> str:
    return json.dumps(conditions[key], sort_keys=True, ensure_ascii=False) if key in conditions else "not set"


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data as it comes back from the file."""
    plain: dict[str, Any] = json.loads(canonical_json(data))
    return plain


def _encode(record: Mapping[str, Any]) -> bytes:
    return canonical_json({**record, "check": _check(record)}) + b"\n"


def _check(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(record)).hexdigest()[:_CHECK_DIGITS]


def _decode(path: Path, lines: Sequence[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Records of the whole lines, and the bytes they take."""
    records = [_record(path, line, first=number == 0) for number, line in enumerate(lines)]
    whole = [record for record in records if record is not None]
    if None in records[: len(whole)]:  # a crash tears the end, and leaves nothing whole behind it
        raise _damaged(path, records.index(None) + 1, "does not carry its own checksum")
    ends = list(itertools.accumulate(map(len, lines[: len(whole)])))
    return [record | {"end": end} for record, end in zip(whole, ends, strict=True)], ends[-1] if ends else 0


def _record(path: Path, line: bytes, first: bool) -> dict[str, Any] | None:
    """The data of a line, ``None`` if the line is not whole."""
    try:
        record = json.loads(line)
        if first and isinstance(record, dict):
            _check_version(path, record)
        whole = isinstance(record, dict) and line.endswith(b"\n") and record.pop("check", None) == _check(record)
    except (ValueError, RecursionError):  # no JSON, or such as we never write: NaN, half a surrogate pair
        return None
    return record if whole else None


def _check_version(path: Path, header: Mapping[str, Any]) -> None:
    version = header.get("version")
    if isinstance(version, int) and version > JOURNAL_VERSION:
        raise OutputError(
            f"{path} has version {version}, this ptq reads up to {JOURNAL_VERSION}: upgrade ptq-toolkit, or start over "
            f"with --restart."
        )


def _from_records(path: Path, records: Sequence[dict[str, Any]]) -> Journal:
    """A journal from its lines, in the only order that a run writes them."""
    ends = [record.pop("end") for record in records]
    header, parts, names = records[0], list[FinishedPart](), None
    if header.get("kind") != "header":
        raise _damaged(path, 1, "is not a header")
    for number, record in enumerate(records[1:], start=2):
        kind = record.pop("kind", None)
        try:
            if kind == "part" and names is None:
                parts.append(FinishedPart(**record))
            elif kind == "finishing" and number == len(records):
                names = [str(name) for name in record["names"]]
            else:
                raise _damaged(path, number, f"has the kind {kind!r} here")
        except (TypeError, KeyError) as error:
            raise _damaged(path, number, f"lacks a field ({error})") from error
    return Journal(path, header.get("conditions"), parts, names, ends)


def _damaged(path: Path, number: int, what: str) -> OutputError:
    return OutputError(
        f"{path} is damaged: line {number} {what}, and no crash of ours leaves such a line. What is finished cannot be "
        f"told from it: start over with --restart."
    )

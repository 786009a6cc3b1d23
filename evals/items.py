"""What was measured item by item: columns of numbers beside a hash that says which item each row is.

An item is a row of a task, or a segment, chunk, window or document of a text. Two records can be paired where their
hashes agree. In JSON a column is zlib-compressed little-endian bytes in base64, with its type and length; reading
checks all three before it believes them.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import DataError

__all__ = ["Column", "Items", "item_hash", "plain_fields"]

Column = NDArray[Any]
_TYPES = ("<f8", "<f4", "<i4", "<u8", "|u1")
_MOST_VALUES = 1 << 27  # a column of a record is read into memory: one gigabyte at most


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Measurements of ``n`` items.

    Args:
        ids: uint64 ``[n]``, `item_hash` of what the model was asked; unique to the content, not to the place.
        columns: name -> values ``[n]``, or ``[sum of counts]`` where a column ``counts`` gives the number of each item.
    """

    ids: Column
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    @property
    def fingerprint(self) -> str:
        """sha256 over the items' hashes, in order."""
        return hashlib.sha256(self.ids.astype("<u8").tobytes()).hexdigest()

    def split(self, name: str) -> list[Column]:
        """A column of ``[sum of counts]`` as one array per item."""
        ends = np.cumsum(self.columns["counts"], dtype=np.int64)[:-1]
        return np.split(self.columns[name], ends)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        columns = {name: _pack(values) for name, values in self.columns.items()}
        return {"count": len(self), "ids": _pack(self.ids), "columns": columns}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Items:
        """Read what `to_dict` wrote.

        Raises:
            DataError: a column that is damaged or has not the length that it should have.
        """
        ids = _unpack(data["ids"], "ids")
        columns = {str(name): _unpack(packed, name) for name, packed in data["columns"].items()}
        items = cls(ids, columns)
        total = int(columns["counts"].sum()) if "counts" in columns else len(ids)
        for name, values in columns.items():
            if len(values) not in (len(ids), total):
                raise DataError(f"column {name!r} has {len(values)} values, but there are {len(ids)} items.")
        return items


def item_hash(content: Any) -> int:
    """64 bits of the sha256 of JSON data: the same question to the same kind of model has the same hash."""
    line = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "little")


def plain_fields(result: Any) -> dict[str, Any]:
    """The fields of a result with items as JSON data, the items last."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    items = fields.pop("items")
    return fields | {"notes": list(result.notes), "items": items.to_dict()}


def _pack(values: Column) -> dict[str, Any]:
    kind = values.dtype.newbyteorder("<").str
    if kind not in _TYPES:
        raise TypeError(f"a column of {values.dtype} is not one of {_TYPES}")
    raw = zlib.compress(np.ascontiguousarray(values.astype(kind)).tobytes(), 9)
    return {"type": kind, "length": len(values), "data": base64.b64encode(raw).decode("ascii")}


def _unpack(packed: Any, name: str) -> Column:
    try:
        kind, length, data = packed["type"], packed["length"], packed["data"]
        if kind not in _TYPES or type(length) is not int or not 0 <= length <= _MOST_VALUES:
            raise ValueError(f"type {kind!r}, length {length!r}")
        size = np.dtype(kind).itemsize * length
        reader = zlib.decompressobj()
        raw = reader.decompress(base64.b64decode(data, validate=True), size + 1)
        if len(raw) != size or not reader.eof:
            raise ValueError(f"{len(raw)} bytes instead of {size}" if len(raw) != size else "its end is missing")
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise DataError(f"column {name!r} of a record is damaged ({error}); evaluate again.") from error
    return np.frombuffer(raw, dtype=kind).copy()

"""Columns of records: the bytes, the way there and back, and columns that lie about themselves."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib.errors import DataError
from evals.items import Items, item_hash

TYPES = ("<f8", "<f4", "<i4", "<u8", "|u1")
GOLDEN = {
    "count": 2,
    "ids": {"type": "<u8", "length": 2, "data": "eNpjZGBgYAJiZiBm+P//PwAGSgME"},
    "columns": {
        "ll": {"type": "<f4", "length": 3, "data": "eNpjYACD/UDsAAAEBwEA"},
        "counts": {"type": "<i4", "length": 2, "data": "eNpjYmBgYARiAAAcAAQ="},
    },
}
"""Written out once; every release must read it."""


def packed(raw: bytes, kind: str = "<f8", length: Any = None) -> dict[str, Any]:
    length = len(raw) // 8 if length is None else length
    return {"type": kind, "length": length, "data": base64.b64encode(zlib.compress(raw)).decode()}


def record(column: Any, ids: Any = None) -> dict[str, Any]:
    return {"count": 1, "ids": ids or packed(bytes(8), "<u8"), "columns": {"nll": column}}


def test_columns_are_compressed_little_endian_bytes() -> None:
    items = Items(np.array([1, 2**64 - 1], dtype=">u8"), {"nll": np.array([1.5, -2.0], dtype=">f8")})
    data = items.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["ids"]["type"], data["ids"]["length"], data["count"]) == ("<u8", 2, 2)
    raw = zlib.decompress(base64.b64decode(data["ids"]["data"]))
    assert raw == bytes([1, 0, 0, 0, 0, 0, 0, 0]) + b"\xff" * 8
    raw = zlib.decompress(base64.b64decode(data["columns"]["nll"]["data"]))
    assert raw == bytes.fromhex("000000000000f83f 00000000000000c0")


def test_golden_columns_are_read() -> None:
    items = Items.from_dict(GOLDEN)
    assert items.ids.tolist() == [1 + 2**33, 2**64 - 2**40 + 3]
    assert items["counts"].tolist() == [2, 1]
    assert items["ll"].tolist() == [0.0, -0.5, 2.0]
    assert [part.tolist() for part in items.split("ll")] == [[0.0, -0.5], [2.0]]


@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 6))
    counts = data.draw(hnp.arrays(np.int32, count, elements=st.integers(1, 3)))
    columns = {"counts": counts}
    for name, kind, size in (("ll", "<f4", int(counts.sum())), ("nll", "<f8", count), ("flag", "|u1", count)):
        columns[name] = data.draw(hnp.arrays(np.dtype(kind), size))
    items = Items(data.draw(hnp.arrays(np.dtype("<u8"), count)), columns)
    again = Items.from_dict(json.loads(json.dumps(items.to_dict())))
    assert again.ids.tobytes() == items.ids.tobytes()
    assert {name: values.tobytes() for name, values in again.columns.items()} == {
        name: values.tobytes() for name, values in columns.items()
    }
    assert again.fingerprint == items.fingerprint
    assert all(values.flags.writeable for values in again.columns.values())
    assert len(again) == count


def test_other_types_are_a_mistake_of_the_caller() -> None:
    for values in (np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.float16), np.array(["a"])):
        with pytest.raises(TypeError, match="is not one of"):
            Items(np.zeros(2, dtype=np.uint64), {"x": values}).to_dict()


DAMAGED: dict[str, Any] = {
    "no type": {"length": 1, "data": ""},
    "no data": {"type": "<f8", "length": 1},
    "other type": packed(bytes(8), "<c16", 1),
    "object type": packed(bytes(8), "|O", 1),
    "type is a list": packed(bytes(8)) | {"type": ["<f8"]},
    "negative length": packed(bytes(8), length=-1),
    "huge length": packed(bytes(8), length=2**40),
    "length is a float": packed(bytes(8), length=1.0),
    "length is true": packed(bytes(8), length=True),
    "length is text": packed(bytes(8), length="1"),
    "too long for its length": packed(bytes(16), length=1),
    "too short for its length": packed(bytes(8), length=2),
    "not base64": packed(bytes(8)) | {"data": "!!!!"},
    "not ASCII": packed(bytes(8)) | {"data": "é"},
    "data is a number": packed(bytes(8)) | {"data": 3},
    "data is null": packed(bytes(8)) | {"data": None},
    "not zlib": packed(bytes(8)) | {"data": base64.b64encode(b"hello").decode()},
    "a list": [1.0],
    "a string": "1.0",
    "null": None,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_columns_are_named(name: str) -> None:
    with pytest.raises(DataError, match="column 'nll' of a record is damaged"):
        Items.from_dict(record(DAMAGED[name]))
    with pytest.raises(DataError, match="column 'ids' of a record is damaged"):
        Items.from_dict(record(packed(bytes(8)), ids=DAMAGED[name] or [None]))


def test_every_truncation_and_every_changed_byte_is_found() -> None:
    raw, ids = zlib.compress(np.arange(5.0).tobytes(), 9), packed(bytes(40), "<u8")
    for end in range(len(raw)):
        column = {"type": "<f8", "length": 5, "data": base64.b64encode(raw[:end]).decode()}
        with pytest.raises(DataError, match="damaged"):
            Items.from_dict(record(column, ids))
    found = 0
    for place in range(2, len(raw)):  # the first two bytes are a header with bits to spare
        changed = raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :]
        column = {"type": "<f8", "length": 5, "data": base64.b64encode(changed).decode()}
        try:
            values = Items.from_dict(record(column, ids))["nll"].tolist()
        except DataError:
            found += 1
        else:
            assert values == [0, 1, 2, 3, 4]  # a bit that says nothing
    assert found >= len(raw) - 4


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of zeros behind a length of one: no more than it says is ever unpacked."""
    import evals.items

    taken: list[int] = []
    original = zlib.decompressobj

    class Reader:
        def __init__(self) -> None:
            self._inner = original()

        def decompress(self, data: bytes, most: int) -> bytes:
            found = self._inner.decompress(data, most)
            taken.append(len(found))
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    monkeypatch.setattr(evals.items.zlib, "decompressobj", Reader)
    monkeypatch.setattr(evals.items.zlib, "decompress", lambda *_: pytest.fail("unpacked as a whole"))
    with pytest.raises(DataError, match="bytes instead of 8"):
        Items.from_dict(record(packed(bytes(64 << 20), length=1)))
    assert max(taken) <= 9


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_columns_have_the_length_of_items_or_of_answers(count: int) -> None:
    columns = {"counts": packed(np.array([2, 3], dtype="<i4").tobytes(), "<i4", 2), "ll": packed(bytes(8 * count))}
    with pytest.raises(DataError, match=f"column 'll' has {count} values, but there are 2 items"):
        Items.from_dict({"count": 2, "ids": packed(bytes(16), "<u8"), "columns": columns})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.lists(st.text(max_size=3))))
def test_a_hash_is_of_the_content_alone(content: dict[str, Any]) -> None:
    value = item_hash(content)
    assert 0 <= value < 2**64
    assert value == item_hash(dict(reversed(content.items())))
    line = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert value == int.from_bytes(hashlib.sha256(line.encode("ascii")).digest()[:8], "little")
    assert value != item_hash({**content, "one more": 1})


def test_hashes_do_not_change_between_releases() -> None:
    assert item_hash([[["Question: é", " a"]], 0]) == 9914369852576066189

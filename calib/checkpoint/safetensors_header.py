"""The header of a safetensors file, checked whole before a byte of weights is read or memory for it is taken.

    8 bytes   little-endian length N of the header
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest  the data; offsets count from its start, cover it without gaps and never overlap

The library that reads the tensors checks much of this again. It is checked here because its messages name neither the
file nor a way out, and because the shapes decide what the rest of the program allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from calib.checkpoint.json import parse_json, quoted
from calib.errors import ModelError

__all__ = ["MAX_HEADER_BYTES", "StoredTensor", "check_headers", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit: room for half a million tensors."""
MAX_DIMENSIONS = 64  # what torch takes
METADATA = "__metadata__"
_AGAIN = "The file is damaged or its download incomplete: fetch it again."

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Width of one element by the format's name of its dtype."""


class StoredTensor(NamedTuple):
    """Where a tensor lies: its file, the format's name of its dtype, its shape and ``[start, end)`` in the data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def check_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of a model's files by name.

    Raises:
        ModelError: see `read_header`; or two files hold a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise ModelError(
                    f"the tensor {quoted(name)} is in {found[name].file.name} and in {file.name} of {file.parent}: "
                    "which one counts cannot be known. Save the model again, or take the files of one download."
                )
            found[name] = stored
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their data.

    Raises:
        ModelError: the header does not fit the file or `MAX_HEADER_BYTES`, is not the JSON shown above, names an
            unknown dtype, or its ranges disagree with the shapes, overlap, leave gaps or miss the end of the file.
    """
    text, data_bytes = _header_text(file)
    header = parse_json(text, f"the header of {file}", strict=True)
    if not isinstance(header, dict):
        raise _refuse(file, f"its header is a {type(header).__name__} and not an object")
    _check_metadata(file, header.pop(METADATA, {}))
    rows = [_stored(file, name, row) for name, row in header.items()]
    order = sorted(zip(header, rows, strict=True), key=lambda pair: (pair[1].start, pair[1].end))
    _check_cover(file, order, data_bytes)
    return dict(order)


def _header_text(file: Path) -> tuple[bytes, int]:
    """The bytes of the header, and how many bytes of data follow it."""
    try:
        with file.open("rb") as handle:
            size = file.stat().st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise _refuse(file, f"it has {size} bytes and claims a header of {length}")
            if length > MAX_HEADER_BYTES:
                raise _refuse(file, f"its header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}")
            return handle.read(length), size - 8 - length
    except OSError as error:
        raise _refuse(file, str(error.strerror)) from error


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(file, f"{METADATA} is not an object of strings")


def _stored(file: Path, name: str, row: Any) -> StoredTensor:
    """One entry of the header, consistent in itself."""
    tensor = f"the entry of {quoted(name)}"
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise _refuse(file, f"{tensor} is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _refuse(file, f"{tensor} has the unknown dtype {quoted(dtype)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _refuse(file, f"{tensor} has the shape {quoted(shape)}, not up to {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refuse(file, f"{tensor} has the data_offsets {quoted(offsets)}, not [start, end]")
    bits = math.prod(shape) * BITS[dtype]
    start, end = offsets
    if bits != 8 * (end - start):
        raise _refuse(file, f"{tensor} is {shape} of {dtype}, {-(-bits // 8)} bytes, at a range of {end - start}")
    return StoredTensor(file, dtype, tuple(shape), start, end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(file: Path, order: list[tuple[str, StoredTensor]], data_bytes: int) -> None:
    """Ranges follow each other from 0 to the end of the file."""
    end = 0
    for name, stored in order:
        if stored.start != end:
            problem = "overlaps the one before" if stored.start < end else "leaves a gap before it"
            raise _refuse(file, f"the range of {quoted(name)} starts at byte {stored.start}, not {end}: it {problem}")
        end = stored.end
    if end != data_bytes:
        raise _refuse(file, f"its header describes {end} bytes of data, the file has {data_bytes}")


def _refuse(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file} is not a readable safetensors file: {problem}. {_AGAIN}")

"""The header of a GGUF file, checked whole before a byte of weights is read or memory for it is taken.

    4 bytes   "GGUF", then uint32 version, uint64 number of tensors, uint64 number of entries
    entries   key, type, value; strings and arrays have a uint64 length in front
    tensors   name, uint32 dimensions, uint64 sizes, uint32 type, uint64 offset in the data
    data      aligned; every tensor lies inside the file

The gguf package reads the same. It is read here first because that package trusts the lengths in the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from calib.checkpoint.json import quoted
from calib.errors import ModelError

__all__ = ["GgufHeader", "GgufTensor", "read_gguf_header"]

MAX_TENSORS = 1 << 20
MAX_ENTRIES = 1 << 16
MAX_ARRAY = 1 << 24
MAX_STRING = 64 << 20
MAX_NAME = 1 << 10
MAX_DIMENSIONS = 4
MAX_DEPTH = 4
VERSIONS = (2, 3)
_AGAIN = "The file is damaged or its download incomplete: fetch it again."
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """One tensor: its shape ``[rows, width]`` as torch has it, its type, its bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file per number."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


class GgufHeader(NamedTuple):
    """Entries by key and all tensors, in the order of the file."""

    entries: dict[str, Any]
    tensors: list[GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file; arrays are given as their lengths, except short ones.

    Raises:
        ModelError: no GGUF file, a version that is not read, lengths beyond the limits above or the file, a type that
            is unknown, a tensor outside the file.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}.")
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except OSError as error:
        raise _refuse(path, str(error.strerror)) from error


class _Reader:
    """One pass over a header."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def header(self) -> GgufHeader:
        if self.bytes(4) != b"GGUF":
            raise _refuse(self.path, "it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise _refuse(self.path, f"it has version {version}, and ptq reads {' and '.join(map(str, VERSIONS))}")
        tensors, entries = self.count(MAX_TENSORS, "tensors"), self.count(MAX_ENTRIES, "entries")
        found = {self.string(MAX_NAME): self.value(self.number("I")) for _ in range(entries)}
        infos = [self.info() for _ in range(tensors)]
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise _refuse(self.path, f"its alignment is {quoted(alignment)}")
        data = -(-self.file.tell() // alignment) * alignment
        for tensor, offset in infos:
            if data + offset + tensor.nbytes > self.size:
                end = data + offset + tensor.nbytes
                raise _refuse(self.path, f"{quoted(tensor.name)} would end at byte {end} of {self.size}")
        return GgufHeader(found, [tensor for tensor, _ in infos])

    def info(self) -> tuple[GgufTensor, int]:
        name, dimensions = self.string(MAX_NAME), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise _refuse(self.path, f"{quoted(name)} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in set(GGMLQuantizationType):
            raise _refuse(self.path, f"{quoted(name)} has the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape)
        if count > 8 * self.size * block or (shape and shape[0] % block):
            raise _refuse(self.path, f"{quoted(name)} has the shape {list(shape)} as {GGMLQuantizationType(kind).name}")
        nbytes = count // block * size
        return GgufTensor(name, shape[::-1], GGMLQuantizationType(kind).name, nbytes), offset

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(MAX_STRING)
        if kind == _ARRAY:
            if depth == MAX_DEPTH:
                raise _refuse(self.path, f"an entry has arrays in arrays, more than {MAX_DEPTH} levels")
            inner, length = self.number("I"), self.count(MAX_ARRAY, "elements of an array")
            values = [self.value(inner, depth + 1) for _ in range(length)]
            return values if length <= 16 else length
        if kind not in _NUMBERS:
            raise _refuse(self.path, f"an entry has the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def count(self, limit: int, what: str) -> int:
        found = self.number("Q")
        if found > min(limit, self.size):
            raise _refuse(self.path, f"it claims {found} {what} (the limit is {limit}, the file has {self.size} bytes)")
        return int(found)

    def string(self, limit: int) -> str:
        length = self.number("Q")
        if length > min(limit, self.size):
            raise _refuse(self.path, f"it claims a text of {length} bytes (the limit is {limit})")
        return self.bytes(length).decode("utf-8", "replace")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def bytes(self, length: int) -> bytes:
        found = self.file.read(length)
        if len(found) != length:
            raise _refuse(self.path, f"it ends at byte {self.size} inside its header")
        return found


def _refuse(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is not a readable GGUF file: {problem}. {_AGAIN}")

"""The header of a GGUF file: metadata and where the tensors are. Standard library only.

The `gguf` package reads headers, too, but builds several numpy arrays for each string of the vocabulary, which takes
seconds. This reader takes a few hundredths of a second and checks every length against the size of the file. The
format is described in the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentserve.errors import ModelFormatError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor is and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, in elements (the file has it the other way round)."""
    type_id: int
    """A `gguf.GGMLQuantizationType`."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The metadata and the table of tensors of one file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    num_bytes: int
    """Size of the whole file."""


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads a header. The last one is remembered until its file changes.

    Raises ModelFormatError for a file that is unreadable, truncated or no GGUF file, and UnsupportedModelError for a
    version that is not supported.
    """
    try:
        status = path.stat()
        return _read_cached(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=1)  # tokenizer, configuration and weights of a model are asked for one after the other
def _read_cached(path: Path, num_bytes: int, mtime_ns: int) -> GGUFHeader:
    del mtime_ns  # only part of the key
    if num_bytes < len(_MAGIC):
        raise ModelFormatError(f"{path} is no GGUF file: it has only {num_bytes} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        try:
            return _read_header(cursor, path)
        except (struct.error, UnicodeDecodeError) as error:
            raise ModelFormatError(f"the header of {path} is damaged: {error}") from error


class _Cursor:
    """Reads little-endian values one after the other; never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.offset = 0
        self._path = path
        self._data = data
        self.size = len(data)

    def take(self, num_bytes: int) -> bytes:
        end = self.offset + num_bytes
        if end > self.size:
            raise ModelFormatError(f"{self._path} is truncated: it ends within its header")
        taken = self._data[self.offset : end]
        self.offset = end
        return taken

    def scalar(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def string(self) -> str:
        return self.take(self.scalar(_U64)).decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array()
        raise ModelFormatError(f"the header of {self._path} is damaged: there is no value type {type_id}")

    def _array(self) -> list[Any]:
        type_id, length = self.scalar(_U32), self.scalar(_U64)
        # Each element takes a byte at least: refuse a nonsensical length before allocating anything.
        if length > self.size:
            raise ModelFormatError(f"{self._path} is truncated: it ends within its header")
        if type_id == _STRING:
            return list(self._strings(length))
        if type_id in _SCALARS:
            kind = _SCALARS[type_id]
            return [value for (value,) in kind.iter_unpack(self.take(kind.size * length))]
        raise ModelFormatError(f"the header of {self._path} has an array of unsupported type {type_id}")

    def _strings(self, count: int) -> Iterator[str]:
        # The vocabulary is a few hundred thousand strings: the loop is kept free of calls.
        data, size, unpack_length = self._data, self.size, _U64.unpack_from
        offset = self.offset
        for _ in range(count):
            start = offset + 8
            end = start + unpack_length(data, offset)[0] if start <= size else start
            if end > size:
                raise ModelFormatError(f"{self._path} is truncated: it ends within its header")
            yield data[start:end].decode("utf-8")
            offset = end
        self.offset = offset


def _read_header(cursor: _Cursor, path: Path) -> GGUFHeader:
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise ModelFormatError(f"{path} is no GGUF file: it does not start with the letters GGUF")
    version = cursor.scalar(_U32)
    if version not in _VERSIONS:
        raise UnsupportedModelError(f"{path} has GGUF version {version}; supported are 2 and 3, little-endian")
    num_tensors, num_entries = cursor.scalar(_U64), cursor.scalar(_U64)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar(_U32))
    infos = [_read_tensor_info(cursor, path) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelFormatError(f"the header of {path} is damaged: its alignment is {alignment!r}")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = {name: GGUFTensor(name, shape, type_id, data_start + offset) for name, shape, type_id, offset in infos}
    return GGUFHeader(path, MappingProxyType(metadata), MappingProxyType(tensors), cursor.size)


def _read_tensor_info(cursor: _Cursor, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.scalar(_U32)
    if num_dimensions > _MAX_DIMENSIONS:
        raise ModelFormatError(f"the header of {path} is damaged: tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar(_U64) for _ in range(num_dimensions)]))
    return name, shape, cursor.scalar(_U32), cursor.scalar(_U64)

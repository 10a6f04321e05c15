"""Files that hold the KV of one block each.

    magic  version  checksum | num_bytes  signature  content id  parent id | payload
    8      4        4          8          16         16          16          num_bytes

All numbers are little-endian. The checksum (CRC-32) is over all that follows it. A file has the name of its content id.
It is written under another name and then renamed, so it is there whole or not at all as long as the machine runs; it
is not synchronized to the disk, because what a power cut leaves of it is found out by the checksum.

The signature stands for everything that KV depends on besides tokens and salt: model, weights, data type, layout.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from agentserve.errors import EngineError

FORMAT_VERSION = 1
ID_BYTES = 16
"""Of signatures and ids of contents."""

_MAGIC = b"AGENTKV\0"
_PREFIX = struct.Struct("<8sII")
_FIELDS = struct.Struct(f"<Q{ID_BYTES}s{ID_BYTES}s{ID_BYTES}s")
HEADER_BYTES = _PREFIX.size + _FIELDS.size
_NAME = re.compile(rf"([0-9a-f]{{{2 * ID_BYTES}}})\.kv(\.tmp)?")


class BadBlockError(EngineError):
    """A file is cut off, damaged, of another version, or of another model."""


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a file says about its payload."""

    num_bytes: int
    signature: bytes
    content_id: bytes
    parent_id: bytes

    def pack(self) -> bytes:
        return _FIELDS.pack(self.num_bytes, self.signature, self.content_id, self.parent_id)


def file_name(content_id: bytes) -> str:
    """The name of the file of a block."""
    return f"{content_id.hex()}.kv"


def is_ours(name: str) -> bool:
    """Whether a file of this name was written here, whole or not: nothing else in the directory is touched."""
    return _NAME.fullmatch(name) is not None


def write_block(path: Path, header: BlockHeader, payload: memoryview) -> None:
    """Writes a file, in place of an older one of that name. Raises OSError; then nothing of it is left."""
    fields = header.pack()
    checksum = zlib.crc32(payload, zlib.crc32(fields))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            write_all(file, memoryview(_PREFIX.pack(_MAGIC, FORMAT_VERSION, checksum) + fields))
            write_all(file, payload)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_all(file: FileIO, data: memoryview) -> None:
    """Writes all of `data` to an unbuffered file, which takes as much at a time as it likes. Raises OSError."""
    while data:
        data = data[file.write(data) :]


def read_header(path: Path) -> BlockHeader:
    """What a file says about itself; its payload is not looked at, but all of it is there.

    Raises OSError, and BadBlockError for a file that cannot be one of ours.
    """
    with path.open("rb", buffering=0) as file:
        header, _ = _read_header(file)
        if os.fstat(file.fileno()).st_size != HEADER_BYTES + header.num_bytes:
            raise BadBlockError("the file is cut off or too long")
        return header


def read_block(path: Path, expected: BlockHeader, into: memoryview) -> None:
    """Reads the payload of a file into `into`, which has its size.

    Raises OSError, and BadBlockError if the file is not what is expected or not what was written; `into` may hold
    anything then.
    """
    with path.open("rb", buffering=0) as file:
        header, checksum = _read_header(file)
        if header != expected:
            raise BadBlockError("the file holds another block, or one of another model")
        rest = into
        while rest:
            num_read = file.readinto(rest)
            if not num_read:
                raise BadBlockError("the file is cut off")
            rest = rest[num_read:]
    if zlib.crc32(into, zlib.crc32(header.pack())) != checksum:
        raise BadBlockError("the file is damaged: its checksum is wrong")


def _read_header(file: FileIO) -> tuple[BlockHeader, int]:
    data = file.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES:
        raise BadBlockError("the file is cut off")
    magic, version, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise BadBlockError("the file has another format or version")
    return BlockHeader(*_FIELDS.unpack_from(data, _PREFIX.size)), checksum

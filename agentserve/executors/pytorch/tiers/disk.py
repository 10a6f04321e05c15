"""The disk tier: a directory of block files that outlives the process.

The control plane addresses slots, the files have the names of their contents. A slot that is written again takes the
file of its former content with it, so there are never more files than slots; that is the cap on the size. Which slot a
file has is decided when the directory is read at the start.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from agentserve.core.transfers import StoredBlock
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.tiers import block_file
from agentserve.executors.pytorch.tiers.block_file import BadBlockError, BlockHeader

logger = logging.getLogger(__name__)

_LOCK_NAME = "agentserve-kv.lock"


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """Where the disk tier is, and for whom."""

    directory: Path
    identity: str
    """Of the weights: KV of others is not used."""


def make_signature(*parts: object) -> bytes:
    """A digest of all that KV depends on besides tokens and salt."""
    text = "\0".join(map(str, parts)).encode()
    return hashlib.blake2b(text, digest_size=block_file.ID_BYTES).digest()


def prepare_directory(directory: Path) -> None:
    """Makes the directory if it is not there. Raises ConfigError if no files can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--kv-disk-path {directory}: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"--kv-disk-path {directory}: {os.strerror(errno.EACCES)}")


class DiskTier:
    """The files of one directory. One thread may write while another one reads."""

    def __init__(self, directory: Path, *, num_blocks: int, block_bytes: int, signature: bytes) -> None:
        """Takes the directory for this process and reads what is there.

        What was used least recently is removed if there are more than `num_blocks` files; so is what has our names and
        cannot be used: cut off, of another version, of another model. Other files are left alone.

        Raises ConfigError if the directory cannot be used or another process uses it.
        """
        prepare_directory(directory)
        self._directory = directory
        self._block_bytes = block_bytes
        self._signature = signature
        self._stopped: str | None = None
        """Why nothing is written any more."""
        self._lock_file = _take(directory)
        self._lock = threading.Lock()  # guards the two tables
        self._contents: dict[int, bytes] = {}
        """What is in a slot."""
        self._slots: dict[bytes, int] = {}
        """Where a content is; the other way round."""
        self.found = self._scan(num_blocks)
        """What was there at the start, the least recently used first."""

    @property
    def num_files(self) -> int:
        """Blocks that are on the disk."""
        with self._lock:
            return len(self._contents)

    def write(self, slot: int, content_id: bytes, parent_id: bytes, payload: memoryview) -> None:
        """Puts a block into a slot. Raises EngineError if it cannot be written; after the first time it never is."""
        if self._stopped is not None:
            raise EngineError(self._stopped)
        try:
            with self._lock:
                old_id, old_slot = self._contents.pop(slot, None), self._slots.pop(content_id, None)
                if old_id is not None and old_id != content_id:
                    del self._slots[old_id]
                if old_slot is not None and old_slot != slot:
                    del self._contents[old_slot]
            if old_id is not None and old_id != content_id:
                self._path(old_id).unlink(missing_ok=True)
            block_file.write_block(self._path(content_id), self._header(content_id, parent_id), payload)
        except OSError as error:
            self._stopped = f"the disk tier has stopped writing to {self._directory}: {error.strerror}"
            logger.error("%s; what is there can still be read, everything else goes on", self._stopped)
            raise EngineError(self._stopped) from error
        with self._lock:
            self._contents[slot], self._slots[content_id] = content_id, slot

    def read(self, content_id: bytes, parent_id: bytes, into: memoryview) -> None:
        """Reads a block; a file that cannot be used is removed.

        Raises EngineError if the block cannot be read; `into` may hold anything then.
        """
        path = self._path(content_id)
        try:
            block_file.read_block(path, self._header(content_id, parent_id), into)
        except (BadBlockError, OSError) as error:
            logger.warning("the block %s is computed again: %s", path.name, error)
            self._drop(content_id)
            raise EngineError(f"{path.name}: {error}") from error
        _touch(path)

    def close(self) -> None:
        """Lets another process have the directory. The files stay."""
        self._lock_file.close()

    def _path(self, content_id: bytes) -> Path:
        return self._directory / block_file.file_name(content_id)

    def _header(self, content_id: bytes, parent_id: bytes) -> BlockHeader:
        return BlockHeader(self._block_bytes, self._signature, content_id, parent_id)

    def _drop(self, content_id: bytes) -> None:
        with self._lock:
            slot = self._slots.pop(content_id, None)
            if slot is not None:
                del self._contents[slot]
        _remove(self._path(content_id))

    def _scan(self, num_blocks: int) -> tuple[StoredBlock, ...]:
        usable: list[tuple[int, BlockHeader]] = []
        num_removed = 0
        for entry in os.scandir(self._directory):
            if not block_file.is_ours(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            header = self._usable(Path(entry.path))
            if header is None:
                num_removed += 1
                _remove(Path(entry.path))
            else:
                usable.append((entry.stat().st_mtime_ns, header))
        usable.sort(key=lambda item: (item[0], item[1].content_id))
        num_extra = max(0, len(usable) - num_blocks)
        for _, header in usable[:num_extra]:
            _remove(self._path(header.content_id))
        found = tuple(StoredBlock(i, h.content_id, h.parent_id) for i, (_, h) in enumerate(usable[num_extra:]))
        self._contents = {block.slot: block.content_id for block in found}
        self._slots = {block.content_id: block.slot for block in found}
        logger.info(
            "%s: %d KV blocks; removed %d that cannot be used and %d for want of room",
            self._directory,
            len(found),
            num_removed,
            num_extra,
        )
        return found

    def _usable(self, path: Path) -> BlockHeader | None:
        """What a file says of itself; None if it is nothing that can be read here."""
        try:
            header = block_file.read_header(path)
        except (BadBlockError, OSError):
            return None
        is_expected = header == self._header(header.content_id, header.parent_id)
        return header if is_expected and path.name == block_file.file_name(header.content_id) else None


def _take(directory: Path) -> _LockFile:
    try:
        return _LockFile(directory / _LOCK_NAME)
    except BlockingIOError:
        raise ConfigError(f"--kv-disk-path {directory}: another process keeps its KV blocks there") from None
    except OSError as error:
        raise ConfigError(f"--kv-disk-path {directory}: {error.strerror}") from None


class _LockFile:
    """A lock that ends with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        import fcntl  # noqa: PLC0415 - not on every system

        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _touch(path: Path) -> None:
    """Marks a file as used just now. That is for the order after a restart only: nothing is lost if it fails."""
    try:
        os.utime(path)
    except OSError as error:
        logger.debug("%s: %s", path, error)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)

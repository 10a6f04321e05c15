"""Keys and values: a paged pool, and dense mirrors of the requests that are being worked on.

The pool is the truth: a block of it may be shared by many requests and outlives them. Attention on a CPU, however,
wants the keys of a sequence in one piece, and gathering them from blocks in every step costs as much memory traffic
as the attention itself. So a request that is being worked on also has a *mirror*, in which its keys and values lie in
order: attention reads the mirror in place, each step appends to it, and what was appended is written through to the
blocks when the batch is done.

    pool     [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]     a block is one piece of memory
    mirror   [num_layers, 2, num_kv_heads, capacity, head_dim]

A mirror is used only if it ends exactly where the next chunk starts; otherwise (prefix hit, preemption, a mirror that
had to go) it is filled from the blocks again. Dropping a mirror is therefore always safe.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from agentserve.core.batch import ScheduledChunk
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.models.config import ModelConfig

_MIRROR_GRANULARITY = 256
"""Capacities are multiples of this many tokens."""


class Mirror:
    """The keys and values of one request in order; owned by the lane that is working on the request."""

    __slots__ = ("buffer", "length", "num_bytes", "pinned")

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        """`[num_layers, 2, num_kv_heads, capacity, head_dim]`; None before the first use."""
        self.length = 0
        """Tokens that are valid."""
        self.num_bytes = 0
        """Bytes reserved for it."""
        self.pinned = False
        """Whether a batch in flight uses it."""

    @property
    def capacity(self) -> int:
        return 0 if self.buffer is None else self.buffer.shape[3]


class KvStore:
    """The pool and the mirrors. Safe for two lanes at once, as long as a request is in one of them only."""

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        block_size: int,
        mirror_limit_bytes: int,
    ) -> None:
        """`mirror_limit_bytes`: what all mirrors may take; exceeded only if the batches in flight need more."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._config = config
        self._device = device
        self._dtype = dtype
        self._bytes_per_token = config.kv_bytes_per_token(dtype.itemsize)
        self._mirror_limit_bytes = mirror_limit_bytes
        # The operating system supplies pages when they are first written: an unused pool costs nothing.
        self._pool = device.empty(
            (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim), dtype
        )
        self._lock = threading.Lock()
        # By last use, oldest first. The lock guards the table, `pinned` and the accounting; the tensors belong to the
        # lane whose batch pinned them.
        self._mirrors: dict[str, Mirror] = {}
        self._mirror_bytes = 0

    @property
    def mirror_bytes(self) -> int:
        """Bytes reserved by mirrors."""
        with self._lock:
            return self._mirror_bytes

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops the mirrors of requests that ended or lost their blocks.

        Called in the order of the batches, before any of them runs: a lane that lags behind cannot then drop the
        mirror of a request that came back.
        """
        with self._lock:
            for request_id in request_ids:
                self._drop(request_id)

    def open(self, chunks: Sequence[ScheduledChunk]) -> list[Mirror]:
        """The mirrors of the chunks' requests, valid up to `chunk.start` and with room up to `chunk.end`.

        They stay pinned until `close`, which must follow in any case.
        """
        with self._lock:
            mirrors = [self._touch(chunk.request_id) for chunk in chunks]
        try:
            for chunk, mirror in zip(chunks, mirrors, strict=True):
                self._make_ready(chunk, mirror)
        except BaseException:
            self.close(mirrors)
            raise
        return mirrors

    def write_through(self, chunks: Sequence[ScheduledChunk], mirrors: Sequence[Mirror]) -> None:
        """Copies what the batch appended to the mirrors into the blocks."""
        for chunk, mirror in zip(chunks, mirrors, strict=True):
            assert mirror.buffer is not None
            for block, start, end in self._pieces(chunk, chunk.start, chunk.end):
                offset = start % self.block_size
                piece = self._pool[block, :, :, :, offset : offset + end - start]
                piece.copy_(mirror.buffer[:, :, :, start:end])
            mirror.length = chunk.end

    def close(self, mirrors: Sequence[Mirror]) -> None:
        """Unpins the mirrors of a batch and evicts the least recently used ones beyond the limit."""
        with self._lock:
            for mirror in mirrors:
                mirror.pinned = False
            self._evict()

    # ---- one mirror ----

    def _touch(self, request_id: str) -> Mirror:
        mirror = self._mirrors.pop(request_id, None) or Mirror()
        self._mirrors[request_id] = mirror  # to the end: used last
        mirror.pinned = True
        return mirror

    def _make_ready(self, chunk: ScheduledChunk, mirror: Mirror) -> None:
        if mirror.length != chunk.start:
            mirror.length = 0
        if mirror.capacity < chunk.end:
            self._grow(mirror, chunk)
        assert mirror.buffer is not None
        if mirror.length != chunk.start:
            for block, start, end in self._pieces(chunk, 0, chunk.start):
                mirror.buffer[:, :, :, start:end].copy_(self._pool[block, :, :, :, : end - start])
            mirror.length = chunk.start

    def _grow(self, mirror: Mirror, chunk: ScheduledChunk) -> None:
        """By half at least, so that a long generation copies each token a bounded number of times."""
        wanted = max(chunk.end, min(mirror.capacity * 3 // 2, self._config.max_position_embeddings))
        capacity = -(-wanted // _MIRROR_GRANULARITY) * _MIRROR_GRANULARITY
        num_bytes = capacity * self._bytes_per_token
        with self._lock:
            # A mirror that was forgotten meanwhile is no longer in the books.
            if self._mirrors.get(chunk.request_id) is mirror:
                self._mirror_bytes += num_bytes - mirror.num_bytes
                mirror.num_bytes = num_bytes
                self._evict()
        config = self._config
        buffer = self._device.empty((config.num_layers, 2, config.num_kv_heads, capacity, config.head_dim), self._dtype)
        if mirror.buffer is not None and mirror.length:
            buffer[:, :, :, : mirror.length].copy_(mirror.buffer[:, :, :, : mirror.length])
        mirror.buffer = buffer

    def _pieces(self, chunk: ScheduledChunk, start: int, end: int) -> Iterable[tuple[int, int, int]]:
        """Splits tokens `start .. end` of a request at block boundaries: (block id, first token, end)."""
        while start < end:
            index = start // self.block_size
            piece_end = min(end, (index + 1) * self.block_size)
            yield chunk.block_ids[index], start, piece_end
            start = piece_end

    # ---- under the lock ----

    def _drop(self, request_id: str) -> None:
        mirror = self._mirrors.pop(request_id, None)
        if mirror is not None:
            self._mirror_bytes -= mirror.num_bytes

    def _evict(self) -> None:
        if self._mirror_bytes <= self._mirror_limit_bytes:
            return
        for request_id in [name for name, mirror in self._mirrors.items() if not mirror.pinned]:
            self._drop(request_id)
            if self._mirror_bytes <= self._mirror_limit_bytes:
                return

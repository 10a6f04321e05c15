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

An agent's next turn begins with the blocks of its last one. So the mirror of a request that ended is kept for a while,
*retired*: a request whose prefix lies in the same blocks takes it over instead of filling its own. What is written to a
block makes that block, and what follows it, invalid in every retired mirror.
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
_MAX_RETIRED = 16
"""Retired mirrors at most: about as many as there are agents on one machine. Each write looks at all of them."""


class Mirror:
    """The keys and values of one request in order; owned by the lane that is working on the request."""

    __slots__ = ("block_ids", "block_set", "buffer", "length", "num_bytes", "pinned")

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        """`[num_layers, 2, num_kv_heads, capacity, head_dim]`; None before the first use."""
        self.length = 0
        """Tokens that are valid."""
        self.num_bytes = 0
        """Bytes reserved for it."""
        self.pinned = False
        """Whether a batch in flight uses it."""
        self.block_ids: tuple[int, ...] = ()
        """The blocks that hold the same tokens."""
        self.block_set: frozenset[int] = frozenset()
        """The same when it retires, to be looked up in: each write of each lane asks every retired mirror."""

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
        self.pages = device.empty(
            (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim), dtype
        )
        self._lock = threading.Lock()
        # By last use, oldest first. The lock guards the table, `pinned` and the accounting; the tensors belong to the
        # lane whose batch pinned them.
        self._mirrors: dict[str, Mirror] = {}
        self._retired: dict[str, Mirror] = {}
        self._mirror_bytes = 0

    def overwritten(self, block_ids: Iterable[int]) -> None:
        """Cuts every mirror before the first of these blocks, which somebody else writes to: their owner has ended.

        Those of requests that have ended but were not retired yet too. No batch in flight has such a mirror.
        """
        written = set(block_ids)
        with self._lock:
            self._cut_retired(written)
            for mirror in self._mirrors.values():
                if not written.isdisjoint(mirror.block_ids):
                    assert not mirror.pinned, "a block is written that a batch in flight reads"
                    self._cut(mirror, written)

    @property
    def mirror_bytes(self) -> int:
        """Bytes reserved by mirrors, retired ones included."""
        with self._lock:
            return self._mirror_bytes

    def forget(self, request_ids: Iterable[str]) -> None:
        """Retires the mirrors of requests that ended or lost their blocks.

        Called in the order of the batches, before any of them runs: a lane that lags behind cannot then drop the
        mirror of a request that came back.
        """
        with self._lock:
            for request_id in request_ids:
                self._retire(request_id)

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
        with self._lock:
            if self._retired:
                self._invalidate(chunks)
        for chunk, mirror in zip(chunks, mirrors, strict=True):
            assert mirror.buffer is not None
            for block, start, end in self._pieces(chunk, chunk.start, chunk.end):
                offset = start % self.block_size
                piece = self.pages[block, :, :, :, offset : offset + end - start]
                piece.copy_(mirror.buffer[:, :, :, start:end])
            mirror.length = chunk.end
            mirror.block_ids = chunk.block_ids

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
            with self._lock:
                self._take_over(chunk, mirror)
        if mirror.capacity < chunk.end:
            self._grow(mirror, chunk)
        assert mirror.buffer is not None
        if mirror.length != chunk.start:
            for block, start, end in self._pieces(chunk, 0, chunk.start):
                mirror.buffer[:, :, :, start:end].copy_(self.pages[block, :, :, :, : end - start])
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

    def _retire(self, request_id: str) -> None:
        mirror = self._mirrors.pop(request_id, None)
        if mirror is None:
            return
        if mirror.pinned or mirror.length < self.block_size:
            self._mirror_bytes -= mirror.num_bytes
            return
        self._discard(request_id)  # an earlier one of this id
        mirror.block_set = frozenset(mirror.block_ids)
        self._retired[request_id] = mirror
        if len(self._retired) > _MAX_RETIRED:
            self._discard(next(iter(self._retired)))

    def _discard(self, request_id: str) -> None:
        mirror = self._retired.pop(request_id, None)
        if mirror is not None:
            self._mirror_bytes -= mirror.num_bytes

    def _invalidate(self, chunks: Sequence[ScheduledChunk]) -> None:
        self._cut_retired({b for chunk in chunks for b in chunk.block_ids[chunk.start // self.block_size :]})

    def _cut_retired(self, written: set[int]) -> None:
        for request_id, mirror in list(self._retired.items()):
            if written.isdisjoint(mirror.block_set):
                continue
            self._cut(mirror, written)
            mirror.block_set = frozenset(mirror.block_ids)
            if not mirror.length:
                self._discard(request_id)

    def _cut(self, mirror: Mirror, written: set[int]) -> None:
        """Leaves what lies before the first of these blocks."""
        index = next(i for i, block in enumerate(mirror.block_ids) if block in written)
        mirror.block_ids = mirror.block_ids[:index]
        mirror.length = min(mirror.length, index * self.block_size)

    def _take_over(self, chunk: ScheduledChunk, mirror: Mirror) -> None:
        """Gives `mirror` the buffer of a retired one that holds the tokens before the chunk, if there is one.

        Not one that holds much more: it belongs to a longer conversation that only begins alike.
        """
        num_blocks, rest = divmod(chunk.start, self.block_size)
        if rest or not num_blocks or self._mirrors.get(chunk.request_id) is not mirror:
            return
        prefix = chunk.block_ids[:num_blocks]
        for request_id, retired in reversed(self._retired.items()):
            if chunk.start <= retired.length <= 2 * chunk.start and retired.block_ids[:num_blocks] == prefix:
                del self._retired[request_id]
                self._mirror_bytes -= mirror.num_bytes
                mirror.buffer, mirror.num_bytes, mirror.length = retired.buffer, retired.num_bytes, chunk.start
                return

    def _evict(self) -> None:
        if self._mirror_bytes <= self._mirror_limit_bytes:
            return
        for request_id in list(self._retired):
            self._discard(request_id)
            if self._mirror_bytes <= self._mirror_limit_bytes:
                return
        for request_id in [name for name, mirror in self._mirrors.items() if not mirror.pinned]:
            self._mirror_bytes -= self._mirrors.pop(request_id).num_bytes
            if self._mirror_bytes <= self._mirror_limit_bytes:
                return

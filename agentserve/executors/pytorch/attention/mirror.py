"""Attention over dense mirrors, for CPUs: see `kv_store`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from agentserve.core.batch import Lane, ScheduledChunk
from agentserve.executors.pytorch.attention.sdpa import SdpaAttention
from agentserve.executors.pytorch.kv_store import KvStore, Mirror


class MirrorBackend:
    """Implements `KvBackend`. For the CPU: it fills and copies mirrors in small pieces."""

    static_steps = None

    def __init__(self, store: KvStore, num_kv_heads: int) -> None:
        self.num_blocks = store.num_blocks
        self.block_size = store.block_size
        self._store = store
        self._num_kv_heads = num_kv_heads

    @property
    def pages(self) -> Tensor:
        """See `KvBackend.pages`."""
        return self._store.pages

    def overwritten(self, block_ids: Sequence[int]) -> None:
        """See `KvBackend.overwritten`: mirrors that hold what was there before hold it no longer."""
        self._store.overwritten(block_ids)

    def open(
        self,
        lane: Lane,  # noqa: ARG002 - mirrors belong to requests
        chunks: Sequence[ScheduledChunk],
        sources: Sequence[int],
        units: int,  # noqa: ARG002 - the threads of the slot are limited already
    ) -> MirrorBatch:
        """See `KvBackend.open`."""
        return MirrorBatch(self._store, chunks, sources, self._store.open(chunks), self._num_kv_heads)

    def forget(self, request_ids: Iterable[str]) -> None:
        """See `KvBackend.forget`."""
        self._store.forget(request_ids)

    def close(self) -> None:
        """See `KvBackend.close`: nothing is page-locked."""


class MirrorBatch:
    """Implements `OpenBatch`; rows are in the order of the chunks."""

    is_static = False

    def __init__(
        self,
        store: KvStore,
        chunks: Sequence[ScheduledChunk],
        sources: Sequence[int],
        mirrors: list[Mirror],
        num_kv_heads: int,
    ) -> None:
        self.attention = SdpaAttention(chunks, mirrors, num_kv_heads)
        self.last_rows: list[int] = []
        row = -1
        for chunk in chunks:
            row += chunk.num_tokens
            self.last_rows.append(row)
        self.num_rows = row + 1
        self._store = store
        self._chunks = chunks
        self._sources = sources
        self._mirrors = mirrors

    def inputs(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """See `OpenBatch.inputs`."""
        chunks = self._chunks
        token_ids = torch.tensor([token_id for chunk in chunks for token_id in chunk.token_ids])
        positions = torch.tensor([position for chunk in chunks for position in range(chunk.start, chunk.end)])
        pending = [(row, source) for row, source in zip(self.last_rows, self._sources, strict=True) if source >= 0]
        if pending:
            rows, sources = zip(*pending, strict=True)
            token_ids[list(rows)] = carried[list(sources)]
        return token_ids, positions

    def finish(self) -> None:
        """See `OpenBatch.finish`: copies to the blocks what is new in the mirrors."""
        self._store.write_through(self._chunks, self._mirrors)

    def close(self) -> None:
        """See `OpenBatch.close`."""
        self._store.close(self._mirrors)

"""Attention over block tables with our C++ kernels for CPUs."""

from __future__ import annotations

from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape, BatchPlan, ChunkRows, Pages, SingleRows
from agentserve_kernels.native import launch


class NativeKernels:
    """Implements `PagedKernels`. The threads are those of the slot; workspaces are the calling thread's."""

    name = "native"
    capturable = False

    def __init__(self, shape: AttentionShape) -> None:
        self._scale = shape.scale

    def plan(self, batch: BatchPlan) -> None:
        """See `PagedKernels.plan`: nothing to plan."""

    def decode(self, query: Tensor, pages: Pages, out: Tensor, rows: SingleRows) -> None:
        """See `PagedKernels.decode`."""
        launch.paged_decode(query, *pages, out, rows.kv_lengths, rows.block_tables, scale=self._scale)

    def prefill(self, query: Tensor, pages: Pages, out: Tensor, rows: ChunkRows) -> None:
        """See `PagedKernels.prefill`."""
        launch.paged_prefill(
            query, *pages, out, rows.query_starts, rows.kv_lengths, rows.block_tables, scale=self._scale
        )

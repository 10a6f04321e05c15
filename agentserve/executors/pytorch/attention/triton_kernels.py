"""Attention over block tables with our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape, BatchPlan, ChunkRows, Pages, SingleRows
from agentserve_kernels.attention import DecodeScratch
from agentserve_kernels.decode import paged_decode, scratch_rows
from agentserve_kernels.prefill import paged_prefill
from agentserve_kernels.tuning import device_capability


class TritonKernels:
    """Implements `PagedKernels`. All workspace is allocated here."""

    name = "triton"
    capturable = True

    def __init__(
        self,
        shape: AttentionShape,
        torch_device: torch.device,
        *,
        max_num_seqs: int,
        max_context: int,
        compute_units: int,
    ) -> None:
        """`max_context`: tokens that a row of the block table of a decode step has room for."""
        self._scale = shape.scale
        self._num_units = compute_units
        num_rows = scratch_rows(
            max_num_seqs,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            max_context,
            compute_units,
            dtype=shape.dtype,
            capability=device_capability(torch_device),
        )
        # Decode and prefill of a lane may share it: they run one after the other in the lane's stream.
        self._scratch = DecodeScratch(num_rows, shape.head_dim, device=torch_device)

    def plan(self, batch: BatchPlan) -> None:
        """See `PagedKernels.plan`: the grid follows the slot."""
        self._num_units = batch.num_units

    def decode(self, query: Tensor, pages: Pages, out: Tensor, rows: SingleRows) -> None:
        """See `PagedKernels.decode`."""
        paged_decode(
            query,
            *pages,
            out,
            rows.kv_lengths,
            rows.block_tables,
            self._scratch,
            scale=self._scale,
            num_units=self._num_units,
        )

    def prefill(self, query: Tensor, pages: Pages, out: Tensor, rows: ChunkRows) -> None:
        """See `PagedKernels.prefill`."""
        paged_prefill(
            query,
            *pages,
            out,
            rows.query_starts,
            rows.kv_lengths,
            rows.block_tables,
            self._scratch,
            scale=self._scale,
            num_units=self._num_units,
        )

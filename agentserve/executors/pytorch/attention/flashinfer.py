"""Attention over block tables with FlashInfer (Ye et al., 2025); the interface is that of version 0.6."""

from __future__ import annotations

from typing import Any

import flashinfer
import numpy as np
import torch
from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import (
    AttentionShape,
    BatchPlan,
    ChunkRows,
    Pages,
    SingleRows,
    page_lists,
)
from agentserve.executors.pytorch.transfer import to_device

_WORKSPACE_BYTES = 128 << 20
"""For partial results of split contexts; what FlashInfer recommends."""
_GENERATION = "fa2"
"""Runs from compute capability 8.0 on. The one for Hopper (fa3) is compiled for minutes, and a machine that was given
modules for the other would be held up by it in its first batch."""
_MIN_GROUP_FOR_TENSOR_CORES = 4
"""With fewer heads to a KV head a decode step has too little to multiply for tensor cores to pay."""


class FlashInferKernels:
    """Implements `PagedKernels`: planners and workspaces of one lane.

    A decode step that may be captured has a planner for its bucket, because a planner whose results are read by a graph
    is fixed to a batch size; other batches share one.
    """

    name = "flashinfer"
    capturable = True

    def __init__(self, shape: AttentionShape, torch_device: torch.device, *, spare_block: int, max_blocks: int) -> None:
        """Allocates the workspace.

        Args:
            shape: of the model's attention.
            torch_device: a GPU.
            spare_block: a block that belongs to nobody: what rows of padding attend to, since there is no empty row.
            max_blocks: the most blocks of a sequence.
        """
        self._shape = shape
        self._torch_device = torch_device
        self._spare_block = spare_block
        self._max_blocks = max_blocks
        # Zeroed, because the first use expects that.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=torch_device)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend=_GENERATION)
        self._mixed_decode = self._decode_planner(None)
        self._static_decodes: dict[int, Any] = {}
        self._decode = self._mixed_decode
        self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._has_planned = False

    def plan(self, batch: BatchPlan) -> None:
        """See `PagedKernels.plan`. Copies its results to the device in the current stream."""
        # A planner writes its results to page-locked memory and lets the device fetch them. With two batches in flight
        # the next plan could overwrite what is still to be fetched. It was fetched before the batch that is running now
        # began, or nearly so: this hardly ever waits.
        if self._has_planned:
            self._planned.synchronize()
        if batch.bucket:
            self._plan_decode(batch)
        if batch.num_singles < len(batch.query_lengths):
            self._plan_prefill(batch)
        self._planned.record()
        self._has_planned = True

    def decode(
        self,
        query: Tensor,
        pages: Pages,
        out: Tensor,
        rows: SingleRows,  # noqa: ARG002 - planned
    ) -> None:
        """See `PagedKernels.decode`."""
        self._decode.run(query.contiguous(), pages, out=out)

    def prefill(
        self,
        query: Tensor,
        pages: Pages,
        out: Tensor,
        rows: ChunkRows,  # noqa: ARG002 - planned
    ) -> None:
        """See `PagedKernels.prefill`."""
        self._prefill.run(query.contiguous(), pages, out=out)

    def _plan_decode(self, batch: BatchPlan) -> None:
        self._decode = self._static_decode(batch.bucket) if batch.is_static else self._mixed_decode
        num_padding = batch.bucket - batch.num_singles
        tables = [*batch.tables[: batch.num_singles], *[np.array([self._spare_block], dtype=np.int32)] * num_padding]
        lengths = [*batch.kv_lengths[: batch.num_singles], *[1] * num_padding]
        starts, indices, last_lengths = page_lists(tables, lengths, self._shape.block_size)
        self._decode.plan(
            starts,
            to_device(indices, self._torch_device),
            last_lengths,
            self._shape.num_heads,
            self._shape.num_kv_heads,
            self._shape.head_dim,
            self._shape.block_size,
            sm_scale=self._shape.scale,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.dtype,
        )

    def _plan_prefill(self, batch: BatchPlan) -> None:
        first = batch.num_singles
        starts, indices, last_lengths = page_lists(
            batch.tables[first:], batch.kv_lengths[first:], self._shape.block_size
        )
        query_starts = torch.tensor([0, *batch.query_lengths[first:]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._prefill.plan(
            query_starts,
            starts,
            to_device(indices, self._torch_device),
            last_lengths,
            self._shape.num_heads,
            self._shape.num_kv_heads,
            self._shape.head_dim,
            self._shape.block_size,
            causal=True,
            sm_scale=self._shape.scale,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.dtype,
        )

    def _static_decode(self, bucket: int) -> Any:
        planner = self._static_decodes.get(bucket)
        if planner is None:
            planner = self._static_decodes[bucket] = self._decode_planner(bucket)
        return planner

    def _decode_planner(self, bucket: int | None) -> Any:
        """A planner for batches of `bucket` rows whose arrays stay where they are, or one for any batch."""
        tensor_cores = self._shape.num_heads // self._shape.num_kv_heads >= _MIN_GROUP_FOR_TENSOR_CORES
        if bucket is None:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "HND", use_tensor_cores=tensor_cores, backend=_GENERATION
            )

        def int32s(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self._torch_device)

        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=int32s(bucket + 1),
            paged_kv_indices_buffer=int32s(bucket * self._max_blocks),
            paged_kv_last_page_len_buffer=int32s(bucket),
            backend=_GENERATION,
        )

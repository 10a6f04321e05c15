"""Attention over block tables, and the rest of a layer, with our C++ kernels for CPUs."""

from __future__ import annotations

from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape, BatchPlan, ChunkRows, Pages, SingleRows
from agentserve.models.interface import HeadNormWeights, RotaryTables
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


class NativeFusedKernels:
    """Implements `paged_batch.FusedKernels`."""

    def write_rotated(
        self,
        projected: Tensor,
        rotary: RotaryTables,
        head_norm: HeadNormWeights | None,
        *,
        pages: Pages,
        slots: Tensor,
        query: Tensor,
    ) -> None:
        """See `paged_batch.FusedKernels.write_rotated`."""
        launch.rope_and_write(
            projected,
            rotary.cos,
            rotary.sin,
            *pages,
            slots,
            query,
            positions=rotary.positions,
            q_weight=None if head_norm is None else head_norm.query,
            k_weight=None if head_norm is None else head_norm.key,
            eps=0.0 if head_norm is None else head_norm.eps,
        )

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `FusedOperations.add_rms_norm`."""
        launch.add_rms_norm(x, residual, weight, eps)
        return x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `FusedOperations.silu_mul`."""
        # Not in the memory of the gates: the matrix product that follows copies rows that do not lie side by side.
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        launch.silu_mul(gate_up, out)
        return out

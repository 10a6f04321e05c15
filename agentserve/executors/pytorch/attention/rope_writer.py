"""Rotation of queries and keys and the write into pages as one kernel, for the attentions that run on a GPU."""

from __future__ import annotations

from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import Pages
from agentserve.models.interface import HeadNormWeights, RotaryTables
from agentserve_kernels.rope import rope_and_write


def write_rotated(
    projected: Tensor,
    rotary: RotaryTables,
    head_norm: HeadNormWeights | None,
    *,
    pages: Pages,
    slots: Tensor,
    query: Tensor,
) -> None:
    """See `paged_batch.WriteRotated`."""
    rope_and_write(
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

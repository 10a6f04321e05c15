"""What lies between the matrix products of a layer, by our Triton kernels, for the attentions that run on a GPU."""

from __future__ import annotations

from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import Pages
from agentserve.models.interface import HeadNormWeights, RotaryTables
from agentserve_kernels import elementwise
from agentserve_kernels.rope import rope_and_write


class TritonFusedKernels:
    """Implements `paged_batch.FusedKernels`. Has no memory, so that both lanes may use one."""

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

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `FusedOperations.add_rms_norm`."""
        elementwise.add_rms_norm(x, residual, weight, eps)
        return x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `FusedOperations.silu_mul`."""
        out = gate_up[:, : gate_up.shape[1] // 2]
        elementwise.silu_mul(gate_up, out)
        return out

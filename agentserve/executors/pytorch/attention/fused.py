"""What lies between the matrix products of a layer, by our own kernels: Triton's for GPUs, those in C++ for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from agentserve.executors.pytorch.attention.paged_kernels import Pages
from agentserve.models.interface import HeadNormWeights, RotaryTables


@dataclass(frozen=True, slots=True)
class LaunchedFusedKernels:
    """Implements `paged_batch.FusedKernels` with functions of the same signatures that `agentserve_kernels` has for
    both devices. Has no memory, so that both lanes may use one."""

    launch_rope_and_write: Callable[..., None]
    """As `agentserve_kernels.rope.rope_and_write`."""
    launch_add_rms_norm: Callable[..., None]
    """As `agentserve_kernels.elementwise.add_rms_norm`."""
    launch_silu_mul: Callable[..., None]
    """As `agentserve_kernels.elementwise.silu_mul`."""
    overwrites_gates: bool
    """Whether activations take the memory of the gates. They do not lie side by side then, and a matrix product that
    has to copy such rows first is better off with new memory."""

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
        self.launch_rope_and_write(
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
        self.launch_add_rms_norm(x, residual, weight, eps)
        return x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `FusedOperations.silu_mul`."""
        half = gate_up.shape[1] // 2
        out = gate_up[:, :half] if self.overwrites_gates else gate_up.new_empty((gate_up.shape[0], half))
        self.launch_silu_mul(gate_up, out)
        return out


def triton_fused_kernels() -> LaunchedFusedKernels:
    """Those for a GPU. Needs Triton."""
    from agentserve_kernels import elementwise, rope  # noqa: PLC0415 - a CPU has no Triton

    return LaunchedFusedKernels(rope.rope_and_write, elementwise.add_rms_norm, elementwise.silu_mul, True)


def native_fused_kernels() -> LaunchedFusedKernels:
    """Those for a CPU, whose library is loaded at the first use."""
    from agentserve_kernels.native import launch  # noqa: PLC0415 - a GPU has no use for it

    return LaunchedFusedKernels(launch.rope_and_write, launch.add_rms_norm, launch.silu_mul, False)

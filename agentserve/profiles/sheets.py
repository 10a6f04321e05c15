"""Profiles from a data sheet alone: what a user of a device that nobody measured gets.

The efficiencies are the same for every device of a kind. Those of GPUs are about halfway between two measured cards, a
GeForce RTX 4090 and an RTX PRO 6000 Blackwell Server Edition under vLLM 0.19 (LLMServingSim 2.0), which both reach
93 % of their bandwidth, 96 and 73 % of their matrix rate, and 80 and 57 % of it in attention. Small kernels are taken
from the same tables.
"""

from __future__ import annotations

from agentserve.core.costmodel import Contention, DeviceProfile
from agentserve.profiles.rows import tile_rows

GPU_BANDWIDTH_EFFICIENCY = 0.88
GPU_MATRIX_EFFICIENCY = 0.85
GPU_ATTENTION_EFFICIENCY = 0.65
_GPU_ROWS = tile_rows(128, 2048)

_GPU_CONTENTION = Contention(decode_split=1.15, prefill_split=1.1, decode_shared=1.8, prefill_shared=1.3)
"""Guesses. Disjoint SMs still share bandwidth and the L2 cache; on shared SMs the small kernels of decode wait for
blocks of prefill. Reports range from an eighth more time per token to several times (RTX 3090, RTX 5090)."""


def from_data_sheet(
    name: str,
    description: str,
    *,
    bandwidth_bytes_per_s: float,
    flops_per_s: float,
    compute_units: int,
    memory_bytes: int,
    cache_bytes: int,
    unit_granularity: int = 2,
    min_units: int = 4,
    provenance: str | None = None,
) -> DeviceProfile:
    """A GPU's profile from what its data sheet says.

    Args:
        bandwidth_bytes_per_s: of the memory.
        flops_per_s: dense (not sparse) matrix rate in the data type that is served, accumulated in float32. GeForce
            cards have half of what they have with float16 accumulation.
        compute_units: SMs.
        cache_bytes: of the L2 cache.
        unit_granularity: SMs by which Green Contexts grow, 8 from compute capability 9.0 on.

    Raises:
        ConfigError: a value is not positive.
    """
    return DeviceProfile(
        name=name,
        description=description,
        compute_units=compute_units,
        unit_granularity=unit_granularity,
        min_units=min_units,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s * GPU_BANDWIDTH_EFFICIENCY,
        flops_per_s=flops_per_s * GPU_MATRIX_EFFICIENCY,
        rows=_GPU_ROWS,
        streaming_slowdown=0.0015,
        bandwidth_saturation=0.85,
        rate_saturation=0.02,
        kv_bandwidth_bytes_per_s=bandwidth_bytes_per_s * GPU_BANDWIDTH_EFFICIENCY,
        attention_flops_per_s=flops_per_s * GPU_ATTENTION_EFFICIENCY,
        attention_tile_rows=64,
        attention_tile_keys=200.0,
        attention_tail=0.5,
        fused_attention=True,
        cache_bytes=cache_bytes,
        cache_misalignment=0.5,
        overhead_ns=100_000,
        layer_overhead_ns=15_000.0,
        sequence_overhead_ns=300.0,
        sample_overhead_ns=1_000.0,
        contention=_GPU_CONTENTION,
        provenance=provenance or "estimated: from the data sheet, with efficiencies that are the same for every GPU",
    )


def cpu_sheet(
    name: str,
    description: str,
    *,
    compute_units: int,
    memory_bytes: int,
    bandwidth_bytes_per_s: float = 10e9,
    flops_per_core_per_s: float = 30e9,
    cache_bytes: int = 32 << 20,
) -> DeviceProfile:
    """Where the fit of a CPU starts: orders of magnitude, to be replaced by measurements.

    `compute_units` are cores. Attention runs sequence by sequence, so decodes and chunks of a batch cost their sum.
    """
    flops_per_s = flops_per_core_per_s * compute_units
    return DeviceProfile(
        name=name,
        description=description,
        compute_units=compute_units,
        unit_granularity=1,
        min_units=1,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        flops_per_s=flops_per_s,
        rows=((1.0, 1.0), (1024.0, 1024.0)),
        streaming_slowdown=0.001,
        bandwidth_saturation=0.6,
        rate_saturation=0.1,
        kv_bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        attention_flops_per_s=flops_per_s / 2,
        attention_tile_rows=1,
        attention_tile_keys=0.0,
        attention_tail=0.0,
        fused_attention=False,
        cache_bytes=cache_bytes,
        cache_misalignment=0.0,
        overhead_ns=500_000,
        layer_overhead_ns=50_000.0,
        sequence_overhead_ns=20_000.0,
        sample_overhead_ns=200_000.0,
        contention=Contention(decode_split=1.05, prefill_split=1.05, decode_shared=1.5, prefill_shared=1.5),
        provenance="estimated: orders of magnitude of a CPU",
    )

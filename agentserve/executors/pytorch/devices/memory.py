"""How much memory of a GPU the KV pool gets: arithmetic over what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory of a device after the weights are loaded and a profiling forward has run.

    The forward is the largest that can come, in every slot that can come to run it, and what torch's allocator took for
    it is still held: in the steady state it is used again, not allocated.
    """

    total_bytes: int
    free_bytes: int
    """As the driver reports it, so that other processes count as used."""


def kv_pool_bytes(
    reading: MemoryReading, utilization: float, *, block_bytes: int, reserve_bytes: int = 0, min_blocks: int = 1
) -> int:
    """Bytes for the KV pool, a whole number of blocks.

    Of the device, `1 - utilization` stays free; of what remains, all that is not yet used, less the reserve, is KV:
    `utilization * total - (total - free) - reserve`. vLLM's option of the same name means the same share.

    Args:
        reading: measured.
        utilization: share of the device's memory that may be used by everybody together, above 0 and at most 1.
        block_bytes: of one KV block.
        reserve_bytes: what will be allocated later (CUDA graphs).
        min_blocks: blocks without which there is no point in starting: those of one request of full length.

    Raises ConfigError if that many blocks do not fit, with the sum in the sentence.
    """
    if not 0.0 < utilization <= 1.0:
        raise ConfigError(f"--gpu-memory-utilization must be above 0 and at most 1, not {utilization}")
    assert 0 <= reading.free_bytes <= reading.total_bytes
    assert block_bytes > 0 and reserve_bytes >= 0 and min_blocks > 0
    used_bytes = reading.total_bytes - reading.free_bytes
    available = int(reading.total_bytes * utilization) - used_bytes - reserve_bytes
    num_blocks = max(0, available) // block_bytes
    if num_blocks < min_blocks:
        raise ConfigError(
            f"there is no room for the KV cache: {utilization:.0%} of {_gib(reading.total_bytes)} less "
            f"{_gib(used_bytes)} in use and {_gib(reserve_bytes)} in reserve leave {_gib(max(0, available))}, "
            f"and at least {_gib(min_blocks * block_bytes)} are needed; "
            "a smaller model or window, or a larger --gpu-memory-utilization, may fit"
        )
    return num_blocks * block_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

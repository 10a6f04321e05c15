"""Counters and gauges of the control plane; a snapshot is immutable and may cross threads."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.core.controllers import Decision


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that hold nothing."""
    num_cached_blocks: int = 0
    """Blocks that hold a prefix nobody uses at the moment; they can be evicted."""
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_computed_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_evicted_blocks: int = 0
    num_steps: int = 0
    num_batches_prefill: int = 0
    num_batches_decode: int = 0
    decision: Decision | None = None
    """How the device is shared at present; None before the first request and for schedulers without a controller."""

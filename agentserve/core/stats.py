"""Counters and gauges of the control plane; a snapshot is immutable and may cross threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentserve.core.controllers import Decision


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier under the device pool. Counts are since the start."""

    tier: str
    num_blocks: int
    num_used_blocks: int
    """Blocks that hold something or are being written."""
    num_hit_tokens: int
    """Prompt tokens whose KV was loaded from it."""
    stored_bytes: int
    """Copied into it."""
    loaded_bytes: int
    """Copied from it to the device."""
    num_dropped_blocks: int
    """Blocks that left the place above it and were not taken in: not worth it, or not copied in time."""
    num_loads: int
    """Copies from it to the device, each of one or more blocks."""
    num_stores: int
    """The same for copies into it."""
    num_failed_transfers: int


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """What the policies of an engine have done since the start."""

    policy: str
    order: str
    counts: Mapping[str, int] = field(default_factory=dict)
    """How often each of their means was used, by name: `pins_held`, `reorders` and the like."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Policies that raised, by name, and what."""
    admission: str = "none"
    speculation: str = "none"


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """LoRA adapters. Counts are since the start."""

    num_adapters: int
    num_slots: int
    """Places on the device."""
    num_resident: int
    """Adapters on the device."""
    num_loads: int
    num_evictions: int
    num_preempted_loads: int
    """Loads that were interrupted by more urgent ones."""
    num_failed_loads: int
    loaded_bytes: int
    load_ns: int
    """Time that copies of adapters to the device took, all in all."""


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
    policies: PolicyStats | None = None
    """None: there are none, it is all built in."""
    tiers: tuple[TierStats, ...] = ()
    """The nearest one first; what `num_prefix_hit_tokens` counts includes what was loaded."""
    adapters: AdapterStats | None = None
    """None: no adapter is known."""

"""What the memory manager answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a prompt at the moment. Nothing is reserved by asking."""

    num_tokens: int
    """Ready tokens: whole blocks, and never the last token, since something must be computed to sample from."""
    num_pending_tokens: int
    """Further whole blocks directly behind them that another request is computing right now."""
    pending_owner: str | None
    """The request that computes the first of them."""


class AllocationOutcome(Enum):
    ALLOCATED = "allocated"
    OUT_OF_BLOCKS = "out_of_blocks"
    PENDING_PREFIX = "pending_prefix"


@dataclass(frozen=True, slots=True)
class Allocation:
    """The answer to `MemoryManager.allocate`."""

    outcome: AllocationOutcome
    num_cached_tokens: int = 0
    """When ALLOCATED: tokens whose KV is ready; whole blocks, fewer than were asked for."""
    num_loading_tokens: int = 0
    """When ALLOCATED: tokens behind them whose KV is being loaded. Until that is over the request must not run."""
    pending_owner: str | None = None
    """When PENDING_PREFIX: who computes the next block."""


@dataclass(frozen=True, slots=True)
class PrefixLock:
    """A cached prefix that stays until `MemoryManager.unlock`."""

    lock_id: int
    num_tokens: int

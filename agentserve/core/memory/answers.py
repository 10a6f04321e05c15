"""What the memory manager answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from agentserve.core.transfers import Tier

if TYPE_CHECKING:
    from agentserve.core.memory.radix import RadixNode

ReadTokens: TypeAlias = tuple[Sequence[int], str | None, str | None]
"""Token ids, cache salt and adapter, as in a request: what KV depends on."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a prompt at the moment. Nothing is reserved by asking."""

    num_tokens: int
    """Ready tokens: whole blocks, and never the last token, since something must be computed to sample from."""
    num_pending_tokens: int
    """Further whole blocks directly behind them that another request is computing right now."""
    pending_owner: str | None
    """The request that computes the first of them."""
    last: RadixNode | None = field(default=None, compare=False, repr=False)
    """The last ready block: as long as it is in the tree, so are all before it."""


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
class Whereabouts:
    """Where the KV of some sequences of tokens is, in whole blocks; what several of them begin with counts once."""

    block_size: int
    """Tokens in a block."""
    num_blocks: int
    """Of all sequences, wherever they are."""
    num_tier_blocks: Mapping[Tier, int]
    """How many are ready in each tier; a block may be in several."""
    num_held_blocks: int
    """Those on the device that requests or locks hold."""
    num_pinned_blocks: int
    """Those on the device that a policy has pinned."""
    pinned_by: frozenset[str]
    """The sessions whose pins these are, by the names that policies know."""


@dataclass(frozen=True, slots=True)
class PrefixLock:
    """A cached prefix that stays until `MemoryManager.unlock`."""

    lock_id: int
    num_tokens: int

"""KV memory: free blocks, the radix tree of cached prefixes, and the manager in front of both."""

from agentserve.core.memory.block import BlockPool
from agentserve.core.memory.manager import Allocation, AllocationOutcome, MemoryManager, PrefixLock, PrefixMatch
from agentserve.core.memory.radix import EvictionKey, RadixNode, lru_key

__all__ = [
    "Allocation",
    "AllocationOutcome",
    "BlockPool",
    "EvictionKey",
    "MemoryManager",
    "PrefixLock",
    "PrefixMatch",
    "RadixNode",
    "lru_key",
]

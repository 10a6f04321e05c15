"""Blocks on their way down, and runs of neighbouring blocks."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.memory.eviction import Worth
from agentserve.core.memory.loads import Place
from agentserve.core.memory.radix import RadixNode
from agentserve.core.memory.tiers import TierEntry


class Copy:
    """A block on its way down, queued or under way."""

    __slots__ = ("content_id", "entry", "is_cancelled", "is_leaving", "origin", "parent_id", "source_id", "worth")

    def __init__(self, content_id: bytes, parent_id: bytes, worth: Worth, source_id: int, origin: Place | None) -> None:
        self.content_id = content_id
        self.parent_id = parent_id
        self.worth = worth
        """By the eviction policy."""
        self.source_id = source_id
        self.origin = origin
        """Where it is copied from, and locked meanwhile; None: the device."""
        self.entry: TierEntry | None = None
        """Where it goes, once it is under way."""
        self.is_leaving = False
        """It has been evicted from the device: its block is free when the copy is done."""
        self.is_cancelled = False


def runs_of(nodes: Sequence[RadixNode]) -> list[list[RadixNode]]:
    """Splits nodes where one is not the child of the one before it."""
    runs: list[list[RadixNode]] = []
    for node in nodes:
        if runs and node.parent is runs[-1][-1]:
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def depth_of(node: RadixNode) -> int:
    """Blocks before this one. O(depth)."""
    depth, above = 0, node.parent
    while above is not None and above.parent is not None:
        depth, above = depth + 1, above.parent
    return depth

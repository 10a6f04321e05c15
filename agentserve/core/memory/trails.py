"""Paths that were used before: the next prompt of a conversation goes on from one of them.

Looking up a prompt takes a step for each of its blocks, and prompts of agents are long and mostly the one before with
a little more behind it. Comparing that in one go is several times as fast. It is a shortcut and nothing else: the path
that is found is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from agentserve.core.memory.radix import RadixNode

MAX_TRAILS = 32
"""More conversations than one device runs at the same time. The one that was used longest ago is forgotten."""
_MIN_BLOCKS = 8
"""A shorter path is looked up as fast."""


class Trail:
    """A path of ready nodes, their blocks and all their tokens.

    It has one owner: it is among the latest ones, or belongs to the request that goes on from it, which makes it longer
    in the end. So nothing of it is copied for that.
    """

    __slots__ = ("block_ids", "path", "token_ids")

    def __init__(self, path: list[RadixNode], block_ids: list[int], token_ids: list[int]) -> None:
        self.path = path
        self.block_ids = block_ids
        self.token_ids = token_ids


class Trails:
    """The latest ones."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._trails: list[Trail] = []
        """In the order of their last use."""

    def find(self, token_ids: Sequence[int], salt: str | None, max_blocks: int) -> Trail | None:
        """One that the first `max_blocks` blocks of a prompt begin with, without what of it is not in the tree now."""
        most = max_blocks * self._size
        for index in range(len(self._trails) - 1, -1, -1):
            trail = self._trails[index]
            known = trail.token_ids
            num_tokens = len(known)
            if (
                num_tokens <= most
                and token_ids[num_tokens - 1] == known[-1]
                and trail.path[0].salt == salt
                and _as_list(token_ids[:num_tokens]) == known
            ):
                return self._in_tree(index)
        return None

    def take(self, trail: Trail | None, path: Sequence[RadixNode]) -> Trail | None:
        """Somebody goes on from a trail and will leave a longer one: `path` begins with it. What there is to go on."""
        if trail is None:
            return None
        assert path[len(trail.path) - 1] is trail.path[-1], "a path does not begin with its trail"
        if trail in self._trails:  # else it was forgotten meanwhile
            self._trails.remove(trail)
        return trail

    def add(self, path: Sequence[RadixNode], num_ready: int, before: Trail | None) -> None:
        """Somebody is done with a path, which goes on from the trail `before`; so many of its nodes are ready."""
        if num_ready < _MIN_BLOCKS:
            return
        trail = Trail([], [], []) if before is None else before
        fresh = path[len(trail.path) : num_ready]
        trail.path += fresh
        trail.block_ids += [node.block_id for node in fresh]
        trail.token_ids += chain.from_iterable([node.key for node in fresh])
        self._trails.append(trail)
        if len(self._trails) > MAX_TRAILS:
            del self._trails[0]

    def _in_tree(self, index: int) -> Trail | None:
        """A trail without its end that was evicted, which is forgotten."""
        trail = self._trails[index]
        num_blocks = len(trail.path)
        while num_blocks and not trail.path[num_blocks - 1].is_in_tree:
            num_blocks -= 1
        if num_blocks == len(trail.path):
            return trail
        if not num_blocks:
            del self._trails[index]
            return None
        for items, count in (
            (trail.path, num_blocks),
            (trail.block_ids, num_blocks),
            (trail.token_ids, num_blocks * self._size),
        ):
            del items[count:]
        return trail


def _as_list(token_ids: Sequence[int]) -> list[int]:
    return token_ids if isinstance(token_ids, list) else list(token_ids)

"""Which cached block goes first: leaves in groups, whose keys a policy may change at any time.

    groups by key          a heap; an entry is outdated when its group got another key since
      leaves by key        a heap in each group; an entry is outdated when its leaf was used again or evicted

What a block is worth within its group is read once, when it becomes an evictable leaf. What changes with time or with
what a session does is the key of the group: a new key is one more entry in the upper heap. So everything is
O(log n) amortized, and without a policy there is one group only: least recently used first.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

from agentserve.core.memory.lazy_heap import LazyHeap

if TYPE_CHECKING:
    from agentserve.core.memory.radix import RadixNode

Key: TypeAlias = tuple[float, ...]
"""What something is worth: the smallest is evicted first."""
EvictionKey: TypeAlias = Callable[["RadixNode"], Key]
"""What a block is worth within its group. It is read when the node becomes an evictable leaf and must not change while
it stays one."""


class Rank(IntEnum):
    """First number of a group's key: what goes first, whatever a policy says (design, section 6)."""

    SUPERSEDED = 0
    """Branches that a session has left."""
    PRIVATE = 1
    """History of one session; also everything that belongs to nobody."""
    SHARED = 2
    """Anchors: what several sessions use, such as a system prompt and its tools."""
    PINNED = 3
    """Private history that is to stay until a time or until its session is back."""


def lru_key(node: RadixNode) -> Key:
    """Least recently used first. Only leaves are evicted, so the end of a path goes before its beginning."""
    return (node.last_access,)


class EvictionGroup:
    """Blocks that are worth the same: the private history of a session, or a class of blocks."""

    __slots__ = (
        "heap",
        "is_listed",
        "is_pinned",
        "is_shared",
        "key",
        "num_cached",
        "num_live",
        "sequence",
        "stamp",
    )

    def __init__(self, key: Key, sequence: int, *, is_shared: bool = False) -> None:
        self.key = key
        self.is_shared = is_shared
        """Whether it holds anchors: what has come here does not become private again."""
        self.sequence = sequence
        """Order of creation: decides between groups of one key."""
        self.is_pinned = False
        self.heap: LazyHeap[Key, RadixNode] = LazyHeap()
        self.num_live = 0
        """Evictable leaves in it."""
        self.num_cached = 0
        """Blocks in it that nobody holds, leaves or not."""
        self.stamp = 0
        """How often it got another key: entries of the upper heap with another number are outdated."""
        self.is_listed = False
        """Whether the upper heap has a current entry of it."""


Worth: TypeAlias = tuple[EvictionGroup | None, Key]
"""What a block is worth among all others, for a place that keeps no groups: that of its group, which may change, and
behind it its own. None: there is no group, and all of it is its own."""


def key_of(worth: Worth) -> Key:
    """What that comes to now. A pin does not count."""
    group, own = worth
    return own if group is None else (*((Rank.PRIVATE,) if group.is_pinned else group.key), *own)


class SessionBlocks:
    """What the memory knows of a session: the group of its private blocks and the path that it used last."""

    __slots__ = ("anchors", "group", "is_transient", "path", "session_id")

    def __init__(self, session_id: str, group: EvictionGroup) -> None:
        self.session_id = session_id
        self.group = group
        self.anchors: EvictionGroup | None = None
        """Where its blocks go that other sessions use, too; None: to those of everybody."""
        self.path: list[RadixNode] = []
        self.is_transient = False
        """Whether its private blocks become free as soon as nobody holds them."""


class EvictionOrder:
    """All evictable leaves, and the order in which they go."""

    def __init__(self, block_key: EvictionKey = lru_key) -> None:
        self.block_key = block_key
        self.num_pinned = 0
        """Blocks that nobody holds, in groups that are pinned."""
        self.num_unlike_lru = 0
        """Evictions of a block that was not the least recently used one; counted once a policy is in charge."""
        self.on_rekey: Callable[[EvictionGroup], None] | None = None
        """Called with each group that has got another key."""
        self._num_groups = 0
        self._groups: LazyHeap[Key, EvictionGroup] = LazyHeap()
        self._num_listed = 0
        self._by_age: LazyHeap[int, RadixNode] | None = None
        self._num_live = 0
        self.common = self.new_group((Rank.PRIVATE,))
        """Blocks without a group of their own."""
        self.superseded = self.new_group((Rank.SUPERSEDED,))
        self.shared = self.new_group((Rank.SHARED,), is_shared=True)

    def new_group(self, key: Key, *, is_shared: bool = False) -> EvictionGroup:
        """A group without blocks. It lives as long as somebody refers to it."""
        return EvictionGroup(key, self.new_sequence(), is_shared=is_shared)

    def new_sequence(self) -> int:
        """The sequence number of a group that is made now."""
        self._num_groups += 1
        return self._num_groups

    def worth(self, node: RadixNode) -> Worth:
        """What a block is worth in a lower tier."""
        group, own = node.group or self.common, self.block_key(node)
        if group in (self.common, self.superseded, self.shared):  # their keys never change
            return None, (*group.key, *own)
        return group, own

    def compare_with_lru(self) -> None:
        """Counts from now on, in `num_unlike_lru`, what is evicted although something else was used longer ago."""
        assert self._by_age is None and self._num_live == 0, "there are blocks already"
        self._by_age = LazyHeap()

    def push(self, node: RadixNode) -> None:
        """A node became an evictable leaf."""
        group = node.group or self.common
        group.heap.push(self.block_key(node), node.sequence, node, group.num_live)
        if self._by_age is not None:
            self._by_age.push(node.last_access, node.sequence, node, self._num_live)
        group.num_live += 1
        self._num_live += 1
        if not group.is_listed:
            self._list(group)

    def discard(self, node: RadixNode) -> None:
        """A node is no evictable leaf any more."""
        group = node.group or self.common
        node.stamp += 1
        group.num_live -= 1
        self._num_live -= 1

    def pop(self) -> RadixNode:
        """Takes out the leaf that goes first. There must be one."""
        group = self._first_group()
        assert group is not None, "nothing can be evicted"
        if self._by_age is not None and not self._is_oldest(group):
            self.num_unlike_lru += 1
        return self.pop_from(group)

    def first_key(self) -> Key | None:
        """What the group is worth whose leaf goes first; None if nothing can be evicted."""
        group = self._first_group()
        return None if group is None else group.key

    def first_worth(self) -> Key | None:
        """The same of the leaf itself: what its group is worth, and what it is worth within that."""
        group = self._first_group()
        if group is None:
            return None
        first = group.heap.first()
        assert first is not None, "a group has no leaf, although it counts some"
        return (*group.key, *first[0])

    def _first_group(self) -> EvictionGroup | None:
        while (first := self._groups.first()) is not None:
            if first[3].num_live:
                return first[3]
            self._groups.pop().is_listed = False
            self._num_listed -= 1
        return None

    def pop_from(self, group: EvictionGroup) -> RadixNode:
        """Takes out the leaf of a group that goes first. There must be one."""
        node = group.heap.pop()
        node.stamp += 1
        group.num_live -= 1
        self._num_live -= 1
        return node

    def rekey(self, group: EvictionGroup, key: Key, *, is_pinned: bool = False) -> None:
        """Gives a group another key. Its blocks are at their new place at once."""
        if is_pinned != group.is_pinned:
            group.is_pinned = is_pinned
            self.num_pinned += group.num_cached if is_pinned else -group.num_cached
        if key == group.key:
            return
        group.key = key
        if self.on_rekey is not None:
            self.on_rekey(group)
        group.stamp += 1
        if group.is_listed:
            group.is_listed = False
            self._num_listed -= 1
        if group.num_live:
            self._list(group)

    def count_cached(self, group: EvictionGroup, change: int) -> None:
        """`change` more blocks of the group are held by nobody."""
        group.num_cached += change
        if group.is_pinned:
            self.num_pinned += change

    def move(self, node: RadixNode, group: EvictionGroup) -> None:
        """Moves a node that nobody holds to another group."""
        was_leaf = node.is_evictable
        if was_leaf:
            self.discard(node)
        if node.group is not None:
            self.count_cached(node.group, -1)
        node.group = group
        self.count_cached(group, 1)
        if was_leaf:
            self.push(node)

    def check_invariants(self, nodes: list[RadixNode]) -> None:
        """Raises AssertionError if a heap or a counter does not fit `nodes`, all that there are."""
        groups = {node.group or self.common for node in nodes} | {entry[3] for entry in self._groups.current()}
        live = []
        for group in groups:
            group.heap.check_invariants()
            entries = group.heap.current()
            assert len(entries) == group.num_live, "the counter of leaves of a group is wrong"
            assert all((entry[3].group or self.common) is group for entry in entries), "a leaf is in another group"
            listed = [entry for entry in self._groups.current() if entry[3] is group]
            assert len(listed) == group.is_listed, "a group is listed twice, or not at all"
            assert group.is_listed or not group.num_live, "a group with leaves is not listed"
            assert all(entry[0] == group.key for entry in listed), "a group is listed with an old key"
            if group is not self.common:
                num_cached = sum(node.num_refs == 0 and node.group is group for node in nodes)
                assert group.num_cached == num_cached, f"{group.num_cached} blocks counted in a group of {num_cached}"
            live += entries
        self._groups.check_invariants()
        evictable = {node.sequence for node in nodes if node.is_evictable}
        assert len(live) == len(evictable) == self._num_live, "a leaf is in the heap twice, or not at all"
        assert {entry[3].sequence for entry in live} == evictable, "the heaps hold other nodes than the evictable ones"
        for key, sequence, _, node in live:
            assert (key, sequence) == (self.block_key(node), node.sequence), f"block {node.block_id}: stale key"
        pinned = sum(node.num_refs == 0 and node.group is not None and node.group.is_pinned for node in nodes)
        assert self.num_pinned == pinned, f"{self.num_pinned} pinned blocks counted, there are {pinned}"

    def _list(self, group: EvictionGroup) -> None:
        self._groups.push(group.key, group.sequence, group, self._num_listed)
        group.is_listed = True
        self._num_listed += 1

    def _is_oldest(self, group: EvictionGroup) -> bool:
        """Whether the first leaf of `group` is the one that was used longest ago."""
        assert self._by_age is not None
        oldest, first = self._by_age.first(), group.heap.first()
        return oldest is not None and first is not None and oldest[3] is first[3]

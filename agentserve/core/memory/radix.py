"""The tree of cached prefixes: one whole block of tokens per edge, one root per salt."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

_MIN_COMPACTION = 64
"""Below this many stale heap entries it is not worth cleaning up."""


class RadixNode:
    """One cached block. The path from the root to it spells out all tokens that its KV depends on.

    A node is *ready*, or *pending* while its owner still computes it. Only the tree and the manager change nodes; an
    eviction policy reads them.
    """

    __slots__ = (
        "block_id",
        "children",
        "key",
        "last_access",
        "num_refs",
        "owner",
        "parent",
        "salt",
        "sequence",
        "stamp",
    )

    def __init__(self, parent: RadixNode | None, key: tuple[int, ...], salt: str | None, block_id: int) -> None:
        self.parent = parent
        """None for a root, which stands for no tokens and has no block."""
        self.key = key
        """The tokens of this block."""
        self.salt = salt
        self.block_id = block_id
        self.children: dict[tuple[int, ...], RadixNode] = {}
        self.num_refs = 0
        """Requests and locks that hold this node. Who holds a node holds all its ancestors, too."""
        self.owner: str | None = None
        """The request that computes the block, None once it is ready."""
        self.last_access = 0
        """Logical time at which a request or a lock let go of it last."""
        self.sequence = 0
        """Order of creation: the last word in every tie."""
        self.stamp = 0
        """How often the node stopped being evictable: heap entries with another number are stale."""

    @property
    def is_ready(self) -> bool:
        return self.owner is None

    @property
    def is_evictable(self) -> bool:
        return self.num_refs == 0 and not self.children and self.parent is not None


EvictionKey: TypeAlias = Callable[[RadixNode], tuple[float, ...]]
"""What a block is worth: the smallest key is evicted first. It is read when a node becomes an evictable leaf and must
not change while the node stays one."""


def lru_key(node: RadixNode) -> tuple[float, ...]:
    """Least recently used first. Only leaves are evicted, so the end of a path goes before its beginning."""
    return (node.last_access,)


class RadixTree:
    """Nodes, reference counts and the order of eviction. Blocks themselves belong to the caller's pool.

    Evictable leaves (nobody holds them, no children) are in a heap that is invalidated lazily: O(log n) amortized.
    """

    def __init__(self, block_size: int, eviction_key: EvictionKey = lru_key) -> None:
        self.num_cached = 0
        """Nodes that nobody holds. All of them can be evicted, one leaf after the other."""
        self._block_size = block_size
        self._eviction_key = eviction_key
        self._roots: dict[str | None, RadixNode] = {}
        self._heap: list[tuple[tuple[float, ...], int, int, RadixNode]] = []
        self._num_stale = 0
        self._last_sequence = 0
        self._last_access = 0

    def find(self, token_ids: Sequence[int], salt: str | None, max_blocks: int) -> list[RadixNode]:
        """The longest path for `token_ids`, at most `max_blocks` nodes: ready ones first, then pending ones."""
        path: list[RadixNode] = []
        node = self._roots.get(salt)
        size = self._block_size
        for start in range(0, max_blocks * size, size):
            if node is None or not node.children:
                break
            node = node.children.get(tuple(token_ids[start : start + size]))
            if node is not None:
                path.append(node)
        return path

    def child(self, parent: RadixNode | None, salt: str | None, key: tuple[int, ...]) -> RadixNode | None:
        """The node for `key` below `parent` (None: the root of `salt`)."""
        above = self._roots.get(salt) if parent is None else parent
        return None if above is None else above.children.get(key)

    def insert(
        self, parent: RadixNode | None, salt: str | None, key: tuple[int, ...], block_id: int, owner: str | None
    ) -> RadixNode:
        """Adds a node below `parent` (None: the root of `salt`), held once by the caller."""
        if parent is None:
            parent = self._roots.get(salt)
            if parent is None:
                parent = self._roots[salt] = RadixNode(None, (), salt, -1)
        assert key not in parent.children, "the node exists already"
        node = RadixNode(parent, key, salt, block_id)
        self._last_sequence += 1
        node.sequence = self._last_sequence
        node.owner = owner
        node.num_refs = 1
        parent.children[key] = node
        return node

    def acquire(self, node: RadixNode) -> None:
        """Holds a node whose ancestors are held already."""
        if node.num_refs == 0:
            self.num_cached -= 1
            if not node.children:
                node.stamp += 1
                self._num_stale += 1
        node.num_refs += 1

    def release(self, node: RadixNode) -> None:
        """Lets go of a ready node. The nodes of a path are released from its end."""
        assert node.num_refs > 0, f"block {node.block_id} is released more often than it was acquired"
        assert node.owner is None, f"block {node.block_id} is pending and cannot stay in the cache"
        node.num_refs -= 1
        if node.num_refs == 0:
            self.num_cached += 1
            if not node.children:
                self._push(node)

    def touch(self, path: Sequence[RadixNode]) -> None:
        """Marks a path as used now. For a holder that is about to release it: until then nothing can be evicted."""
        self._last_access += 1
        for node in path:
            node.last_access = self._last_access

    def remove(self, node: RadixNode) -> None:
        """Takes a node without children out of the tree."""
        parent = node.parent
        assert parent is not None, "a root cannot be removed"
        assert not node.children, f"block {node.block_id} has descendants and cannot be removed"
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]  # else every salt ever used would stay
        elif parent.is_evictable:
            self._push(parent)

    def evict(self) -> int:
        """Removes the evictable leaf with the smallest key; returns its block. There must be one."""
        while True:
            assert self._heap, f"nothing can be evicted, but {self.num_cached} blocks are counted as cached"
            _, _, stamp, node = heapq.heappop(self._heap)
            if stamp == node.stamp:
                self.num_cached -= 1
                self.remove(node)
                return node.block_id
            self._num_stale -= 1

    def nodes(self) -> Iterator[RadixNode]:
        """All nodes but the roots, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def check_invariants(self) -> None:
        """Raises AssertionError if links, counters or the heap are wrong."""
        for salt, root in self._roots.items():
            assert root.parent is None and root.salt == salt and root.children, f"the root of salt {salt!r} is wrong"
        nodes = list(self.nodes())
        for node in nodes:
            parent = node.parent
            assert parent is not None and parent.children.get(node.key) is node, f"block {node.block_id}: wrong parent"
            assert node.salt == parent.salt, f"block {node.block_id}: another salt than its parent"
            assert len(node.key) == self._block_size, f"block {node.block_id}: not a whole block of tokens"
            if parent.parent is not None:
                assert node.num_refs <= parent.num_refs, f"block {node.block_id} is held, but not its parent"
                assert parent.owner in (None, node.owner), f"block {node.block_id} is ready below a pending one"
        num_cached = sum(node.num_refs == 0 for node in nodes)
        assert self.num_cached == num_cached, f"{self.num_cached} cached blocks counted, there are {num_cached}"
        live = [entry for entry in self._heap if entry[2] == entry[3].stamp]
        assert len(self._heap) - len(live) == self._num_stale, "the counter of stale heap entries is wrong"
        evictable = {node.sequence for node in nodes if node.is_evictable}
        assert len(live) == len(evictable), "a leaf is in the heap twice, or not at all"
        assert {entry[3].sequence for entry in live} == evictable, "the heap holds other nodes than the evictable ones"
        for key, sequence, _, node in live:
            assert (key, sequence) == (self._eviction_key(node), node.sequence), f"block {node.block_id}: stale key"
        for index in range(1, len(self._heap)):
            assert self._heap[(index - 1) // 2][:3] < self._heap[index][:3], "the heap is out of order"

    def _push(self, node: RadixNode) -> None:
        if self._num_stale > _MIN_COMPACTION and 2 * self._num_stale > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2] == entry[3].stamp]
            heapq.heapify(self._heap)
            self._num_stale = 0
        heapq.heappush(self._heap, (self._eviction_key(node), node.sequence, node.stamp, node))

"""The tree of cached prefixes: one whole block of tokens per edge, one root per salt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agentserve.core.memory.eviction import EvictionGroup, EvictionKey, EvictionOrder, SessionBlocks, lru_key

if TYPE_CHECKING:
    from agentserve.core.memory.sharing import UserGroups

__all__ = ["EvictionKey", "RadixNode", "RadixTree", "lru_key"]


class RadixNode:
    """One cached block. The path from the root to it spells out all tokens that its KV depends on.

    A node is *ready*, or *pending* while its owner still computes it. Only the tree and the manager change nodes; an
    eviction policy reads them.
    """

    __slots__ = (
        "block_id",
        "children",
        "content_id",
        "group",
        "key",
        "last_access",
        "num_refs",
        "num_uses",
        "owner",
        "parent",
        "salt",
        "sequence",
        "stamp",
        "user",
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
        """Requests and locks whose path ends here, and children that are held: who holds a node holds all its
        ancestors, too, but only those that nobody held before need to be told."""
        self.owner: str | None = None
        """The request that computes the block, None once it is ready."""
        self.last_access = 0
        """Logical time at which a request or a lock let go of it last."""
        self.sequence = 0
        """Order of creation: the last word in every tie."""
        self.stamp = 0
        """How often the node stopped being evictable: heap entries with another number are stale."""
        self.content_id: bytes | None = None
        """What lower tiers know the block by; None until one of them is asked for it."""
        self.group: EvictionGroup | None = None
        """Where it stands in the order of eviction; None: in the group of all that belong to nobody. It changes only
        while the node is held, or through `EvictionOrder.move`."""
        self.user: SessionBlocks | None = None
        """The session that has used it, the latest one if there were several. None: nobody known."""
        self.num_uses = 0
        """How often a session has used it."""

    @property
    def is_ready(self) -> bool:
        return self.owner is None

    @property
    def is_in_tree(self) -> bool:
        """Whether it was not evicted."""
        return self.parent is not None and self.parent.children.get(self.key) is self

    @property
    def is_evictable(self) -> bool:
        return self.num_refs == 0 and not self.children and self.parent is not None


class RadixTree:
    """Nodes, reference counts and the order of eviction. Blocks themselves belong to the caller's pool.

    Evictable leaves (nobody holds them, no children) are in an `EvictionOrder`: O(log n) amortized.
    """

    def __init__(self, block_size: int, eviction_key: EvictionKey = lru_key) -> None:
        self.num_cached = 0
        """Nodes that nobody holds. All of them can be evicted, one leaf after the other."""
        self.order = EvictionOrder(eviction_key)
        self.protects_anchors = True
        """Whether what several sessions use outlives what one of them uses."""
        self.sharing: UserGroups | None = None
        """Set if what several sessions use is worth what it is worth to one of them, instead."""
        self._block_size = block_size
        self._roots: dict[str | None, RadixNode] = {}
        self._last_sequence = 0
        self.last_access = 0
        """Logical time of the latest `touch`."""

    def find(
        self, token_ids: Sequence[int], salt: str | None, max_blocks: int, known: Sequence[RadixNode] = ()
    ) -> list[RadixNode]:
        """The longest path for `token_ids`, at most `max_blocks` nodes: ready ones first, then pending ones.

        `known`: its beginning, if somebody knows that already.
        """
        path = list(known)
        node = path[-1] if path else self._roots.get(salt)
        if node is None or not node.children:
            return path
        size = self._block_size
        tokens = iter(token_ids[len(path) * size : max_blocks * size])
        for key in zip(*[tokens] * size, strict=False):  # whole blocks
            node = node.children.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def child(self, parent: RadixNode | None, salt: str | None, key: tuple[int, ...]) -> RadixNode | None:
        """The node for `key` below `parent` (None: the root of `salt`)."""
        above = self._roots.get(salt) if parent is None else parent
        return None if above is None else above.children.get(key)

    def insert(
        self, parent: RadixNode | None, salt: str | None, key: tuple[int, ...], block_id: int, owner: str | None
    ) -> RadixNode:
        """Adds a node below `parent` (None: the root of `salt`), the new end of the caller's path."""
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
        """Holds a node and all its ancestors. O(those that nobody held before)."""
        parent, order, num_held = node.parent, self.order, 0
        if not (node.children or node.num_refs or parent is None):  # no other one is a leaf
            order.discard(node)
        while parent is not None:
            num_refs = node.num_refs
            node.num_refs = num_refs + 1
            if num_refs:
                break
            num_held += 1
            if node.group is not None:
                order.count_cached(node.group, -1)
            node, parent = parent, parent.parent
        self.num_cached -= num_held

    def go_on(self, node: RadixNode) -> None:
        """Makes a node, which exists, the new end of a path that ended with its parent."""
        self.acquire(node)
        parent = node.parent
        if parent is not None and parent.parent is not None:
            parent.num_refs -= 1  # it is the end of the path no more

    def release(self, node: RadixNode) -> None:
        """Lets go of the end of a path, which must be ready, and of all its ancestors. O(those that nobody holds)."""
        assert node.num_refs > 0, f"block {node.block_id} is released more often than it was acquired"
        assert node.owner is None, f"block {node.block_id} is pending and cannot stay in the cache"
        parent, order, num_released, end = node.parent, self.order, 0, node
        while parent is not None:
            num_refs = node.num_refs = node.num_refs - 1
            if num_refs:
                break
            num_released += 1
            if node.group is not None:
                order.count_cached(node.group, 1)
            node, parent = parent, parent.parent
        if end.is_evictable:  # no other one is a leaf
            order.push(end)
        self.num_cached += num_released

    def touch(self, path: list[RadixNode], session: SessionBlocks | None = None) -> None:
        """Marks a path as used now, by `session` if it is known.

        For a holder that is about to release it: until then nothing of it can be evicted.
        """
        self.last_access = now = self.last_access + 1
        for node in path:
            node.last_access = now
        if session is not None:
            self._claim(path, session)

    def _claim(self, path: list[RadixNode], session: SessionBlocks) -> None:
        """Puts a path that is held where it belongs: to its session, or to what several use."""
        group = session.group
        shared = session.anchors or self.order.shared if self.protects_anchors else group
        sharing = self.sharing
        for node in path:
            node.num_uses += 1
            if sharing is not None:
                node.group = sharing.group_after(node, session)
                node.user = session
            elif node.user is session:
                if node.group is None or not node.group.is_shared:
                    node.group = group
            else:
                node.group = group if node.user is None else shared
                node.user = session
        self._supersede(session, path)
        session.path = path

    def _supersede(self, session: SessionBlocks, path: list[RadixNode]) -> None:
        """What the session used last and has left now goes first.

        It has left a branch if it goes on from before the branch's end with other tokens, and at least half of the
        branch is kept. Less in common means that one name stands for several conversations, such as those of
        sub-agents, and the other ones are still in use.
        """
        before = session.path
        num_common = 0
        for old, new in zip(before, path, strict=False):
            if old is not new:
                break
            num_common += 1
        if num_common not in (len(before), len(path)) and 2 * num_common >= len(before):
            self.supersede(session, num_common)

    def supersede(self, session: SessionBlocks, num_kept: int) -> int:
        """Lets what is private behind the first `num_kept` blocks of a session's last path go first; how many."""
        num_moved = 0
        for node in session.path[num_kept:]:
            if not node.is_in_tree:
                break  # it was evicted, and all behind it before
            if node.user is session and node.group is session.group and node.num_refs == 0:
                self.order.move(node, self.order.superseded)
                num_moved += 1
        return num_moved

    def remove(self, node: RadixNode) -> None:
        """Takes a node without children out of the tree. If it is the end of a path, that ends with its parent now."""
        parent = node.parent
        assert parent is not None, "a root cannot be removed"
        assert not node.children, f"block {node.block_id} has descendants and cannot be removed"
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]  # else every salt ever used would stay
        elif parent.is_evictable:
            self.order.push(parent)

    def evict(self) -> int:
        """Removes the evictable leaf that goes first; returns its block. There must be one."""
        return self.evict_leaf().block_id

    def evict_leaf(self) -> RadixNode:
        """Removes the evictable leaf that goes first and returns it. There must be one."""
        return self._evicted(self.order.pop())

    def evict_group(self, group: EvictionGroup, max_nodes: int | None = None) -> list[RadixNode]:
        """Removes the blocks of a group that nobody needs, leaves first, at most so many; returns them in this order.

        A branch goes in one go: what is above a leaf does not become one first.
        """
        limit, evicted = sys.maxsize if max_nodes is None else max_nodes, list[RadixNode]()
        while group.num_live and len(evicted) < limit:
            node = self.order.pop_from(group)
            first = len(evicted)
            evicted.append(node)
            parent = node.parent
            while (
                parent is not None
                and len(evicted) < limit
                and parent.group is node.group
                and not parent.num_refs
                and parent.parent is not None
                and len(parent.children) == 1
            ):
                parent.children.clear()
                node = parent
                evicted.append(node)
                parent = node.parent
            if node.group is not None:
                self.order.count_cached(node.group, first - len(evicted))
            self.remove(node)
        self.num_cached -= len(evicted)
        return evicted

    def forget_sessions(self) -> None:
        """Nobody's blocks are anybody's any more, and the least recently used one goes first."""
        self.order = EvictionOrder()
        self.sharing = None
        for node in self.nodes():
            node.group = node.user = None
            if node.is_evictable:
                self.order.push(node)

    def _evicted(self, node: RadixNode) -> RadixNode:
        self.num_cached -= 1
        if node.group is not None:
            self.order.count_cached(node.group, -1)
        self.remove(node)
        return node

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
                assert parent.num_refs or not node.num_refs, f"block {node.block_id} is held, but not its parent"
                assert parent.owner in (None, node.owner), f"block {node.block_id} is ready below a pending one"
        num_cached = sum(node.num_refs == 0 for node in nodes)
        assert self.num_cached == num_cached, f"{self.num_cached} cached blocks counted, there are {num_cached}"
        self.order.check_invariants(nodes)
        if self.sharing is not None:
            self.sharing.check_invariants()

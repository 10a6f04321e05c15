"""One tier of KV blocks under the device pool: what is in it, in which slot, and what leaves it first.

A tier is addressed by content: the id of a block is a digest of everything its KV depends on (salt and all tokens up to
its end). So a block is found again whatever happened to its neighbours, and ids mean the same after a restart.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from agentserve.config import TierConfig
from agentserve.core.memory.block import BlockPool
from agentserve.core.memory.eviction import EvictionGroup, Key, Worth, key_of
from agentserve.core.memory.lazy_heap import LazyHeap
from agentserve.core.memory.radix import RadixNode
from agentserve.core.stats import TierStats
from agentserve.core.transfers import StoredBlock, Tier

_DIGEST_BYTES = 16


def root_id(salt: str | None) -> bytes:
    """What the ids of all blocks of a salt start from."""
    text = b"" if salt is None else b"salt:" + salt.encode()
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()


def child_id(parent_id: bytes, token_ids: Sequence[int]) -> bytes:
    """The id of the block with these tokens behind the block `parent_id` (or the root of a salt)."""
    return hashlib.blake2b(parent_id + array("q", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def content_id(node: RadixNode) -> bytes:
    """The id of a node's block; kept in the node. O(1) where its parent's is known, else O(depth)."""
    chain = []
    current = node
    while current.content_id is None:
        if current.parent is None:
            current.content_id = root_id(current.salt)
            break
        chain.append(current)
        current = current.parent
    found = current.content_id
    for current in reversed(chain):
        found = current.content_id = child_id(found, current.key)
    return found


class TierEntry:
    """A block in a tier. It is *arriving* until it has been written, and locked while it is read."""

    __slots__ = ("content_id", "is_ready", "key", "num_refs", "parent_id", "sequence", "slot", "stamp", "worth")

    def __init__(self, content_id: bytes, parent_id: bytes, worth: Worth, slot: int, sequence: int) -> None:
        self.content_id = content_id
        self.parent_id = parent_id
        self.worth = worth
        """By the eviction policy."""
        self.key = key_of(worth)
        """What that was when it was listed last: smallest goes first."""
        self.slot = slot
        self.sequence = sequence
        self.is_ready = False
        self.num_refs = 0
        """Transfers, under way or queued, that read it."""
        self.stamp = 0
        """Heap entries with another number are outdated."""


class TierStore:
    """The blocks of one tier. Moves no bytes.

    The order of eviction is that of the device: smallest key first, and the end of a prefix before its beginning.
    """

    def __init__(self, config: TierConfig) -> None:
        self.tier = Tier(config.name)
        self.config = config
        self.num_blocks = config.num_blocks
        self._pool = BlockPool(config.num_blocks)
        self._entries: dict[bytes, TierEntry] = {}
        self._num_children: Counter[bytes] = Counter()
        """Entries directly behind a block, whether that one is here or not."""
        self._heap: LazyHeap[Key, TierEntry] = LazyHeap()
        self._num_listed = 0
        self._leaves: dict[EvictionGroup, dict[TierEntry, None]] = {}
        """The entries in the heap, by their groups."""
        self._last_sequence = 0

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_used_blocks(self) -> int:
        """Blocks that hold something or are being written."""
        return self.num_blocks - self._pool.num_free

    def find(self, content_id: bytes) -> TierEntry | None:
        """The block, ready or arriving."""
        return self._entries.get(content_id)

    def insert(self, content_id: bytes, parent_id: bytes, worth: Worth) -> TierEntry:
        """Takes a free slot for a block that is about to be written. There must be one, and the block must be new."""
        (slot,) = self._pool.take(1)
        return self._add(content_id, parent_id, worth, slot)

    def restore(self, blocks: Iterable[StoredBlock]) -> None:
        """Takes in what the tier held before it was known, in slots that are free. The first one is worth least.

        All of it is worth less than what comes later, until somebody uses it.
        """
        for block in blocks:
            self._pool.take_exactly(block.slot)
            self.arrived(self._add(block.content_id, block.parent_id, (None, ()), block.slot))

    def _add(self, content_id: bytes, parent_id: bytes, worth: Worth, slot: int) -> TierEntry:
        assert content_id not in self._entries, "the block is in the tier already"
        self._last_sequence += 1
        entry = TierEntry(content_id, parent_id, worth, slot, self._last_sequence)
        self._entries[content_id] = entry
        parent = self._entries.get(parent_id)
        if parent is not None:
            self._unlist(parent)
        self._num_children[parent_id] += 1
        return entry

    def arrived(self, entry: TierEntry) -> None:
        """The block has been written."""
        entry.is_ready = True
        self._list(entry)

    def acquire(self, entry: TierEntry) -> None:
        """Keeps a ready block while it is read."""
        self._unlist(entry)
        entry.num_refs += 1

    def release(self, entry: TierEntry) -> None:
        """Ends one `acquire`."""
        assert entry.num_refs > 0, "a block of a tier is released more often than it was acquired"
        entry.num_refs -= 1
        self._list(entry)

    def rate(self, entry: TierEntry, worth: Worth) -> None:
        """Changes what a block is worth."""
        if worth != entry.worth:
            self._unlist(entry)
            entry.worth = worth
            self._list(entry)

    def rekeyed(self, group: EvictionGroup) -> None:
        """A group of blocks is worth more or less than before. O(log n) for each end of a prefix in it."""
        for entry in tuple(self._leaves.get(group, ())):
            self._unlist(entry)
            self._list(entry)

    def discard(self, entry: TierEntry) -> None:
        """Takes a block that nobody reads out of the tier, ready or not."""
        assert entry.num_refs == 0, "a block that is being read cannot leave its tier"
        self._unlist(entry)
        del self._entries[entry.content_id]
        self._pool.put(entry.slot)
        self._num_children[entry.parent_id] -= 1
        if not self._num_children[entry.parent_id]:
            del self._num_children[entry.parent_id]
            parent = self._entries.get(entry.parent_id)
            if parent is not None:
                self._list(parent)

    def discard_idle(self, entry: TierEntry) -> None:
        """Takes a block out of the tier unless it has left already or somebody still reads it."""
        if not entry.num_refs and self._entries.get(entry.content_id) is entry:
            self.discard(entry)

    def entries(self) -> Iterator[TierEntry]:
        """All blocks, in no particular order. For checks."""
        return iter(self._entries.values())

    def victim(self) -> TierEntry | None:
        """The block that leaves next; None if every block is arriving, being read, or before such a block."""
        first = self._heap.first()
        if first is None:
            return None
        assert first[0] == first[3].key, "a block was rated while it was listed"
        return first[3]

    def run_above(self, victim: TierEntry, limit: int) -> list[TierEntry]:
        """The victim and the blocks before it that can leave once those behind them have left; at most `limit`."""
        run = [victim]
        while len(run) < limit:
            parent = self._entries.get(run[-1].parent_id)
            if parent is None or not parent.is_ready or parent.num_refs or self._num_children[parent.content_id] > 1:
                break
            run.append(parent)
        return run

    def stats(self, counts: Mapping[str, int], block_size: int) -> TierStats:
        """The tier as it is now. `counts`: what was done with it, by name; those that are missing are 0."""
        return TierStats(
            tier=self.tier.value,
            num_blocks=self.num_blocks,
            num_used_blocks=self.num_used_blocks,
            num_hit_tokens=counts.get("hit_blocks", 0) * block_size,
            stored_bytes=counts.get("stored_bytes", 0),
            loaded_bytes=counts.get("loaded_bytes", 0),
            num_dropped_blocks=counts.get("dropped", 0),
            num_loads=counts.get("loads", 0),
            num_stores=counts.get("stores", 0),
            num_failed_transfers=counts.get("failed", 0),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if slots, counts or the heap are wrong."""
        self._pool.check_invariants()
        slots = [entry.slot for entry in self._entries.values()]
        assert len(slots) == len(set(slots)), f"{self.tier}: two blocks in one slot"
        assert not any(self._pool.is_free(slot) for slot in slots), f"{self.tier}: a slot is free and in use"
        assert len(slots) + self._pool.num_free == self.num_blocks, f"{self.tier}: a slot was lost"
        children = Counter(entry.parent_id for entry in self._entries.values())
        assert children == self._num_children, f"{self.tier}: wrong counts of children"
        self._heap.check_invariants()
        live = [entry[3] for entry in self._heap.current()]
        evictable = {entry.sequence for entry in self._entries.values() if self._is_evictable(entry)}
        assert sorted(entry.sequence for entry in live) == sorted(evictable), f"{self.tier}: the heap is wrong"
        assert len(live) == self._num_listed, f"{self.tier}: wrong count of listed blocks"
        leaves = [leaf for leaves in self._leaves.values() for leaf in leaves]
        assert {id(leaf) for leaf in leaves} == {id(entry) for entry in live if entry.worth[0] is not None}
        assert all(entry.key == key_of(entry.worth) for entry in live), f"{self.tier}: an entry has an old key"

    def _is_evictable(self, entry: TierEntry) -> bool:
        return entry.is_ready and not entry.num_refs and entry.content_id not in self._num_children

    def _list(self, entry: TierEntry) -> None:
        """Puts an entry into the heap if it can leave now. It must not be there."""
        if not self._is_evictable(entry):
            return
        entry.key = key_of(entry.worth)
        self._heap.push(entry.key, entry.sequence, entry, self._num_listed)
        self._num_listed += 1
        group = entry.worth[0]
        if group is not None:
            self._leaves.setdefault(group, {})[entry] = None

    def _unlist(self, entry: TierEntry) -> None:
        """Makes the entry's place in the heap outdated, if it has one; called before it changes."""
        if self._is_evictable(entry):
            entry.stamp += 1
            self._num_listed -= 1
            group = entry.worth[0]
            if group is not None:
                leaves = self._leaves[group]
                del leaves[entry]
                if not leaves:
                    del self._leaves[group]

"""What goes down: blocks of the device into the first tier, and from there on.

A block that has to leave and is not below yet is copied first; its place is free when that is done. What nobody uses
any more is copied beforehand while its link is idle, if the mode of writing back is `incremental`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

from agentserve.config import TieringConfig
from agentserve.core.memory.copies import Copy, depth_of, runs_of
from agentserve.core.memory.eviction import Key, Worth, key_of
from agentserve.core.memory.flush import FlushQueue
from agentserve.core.memory.radix import RadixNode
from agentserve.core.memory.tiers import TierStore, content_id


class IsWorth(Protocol):
    """Whether loading so many blocks from a tier, behind `start` tokens, is predicted to beat computing them."""

    def __call__(self, tier: int, num_blocks: int, start: int) -> bool: ...


class WriteBack:
    """The copies into all tiers, queued or under way. Belongs to `Residency`, which has the links."""

    def __init__(
        self,
        config: TieringConfig,
        block_size: int,
        tiers: Sequence[TierStore],
        counts: Sequence[Counter[str]],
        *,
        worth: Callable[[RadixNode], Worth],
        free_block: Callable[[int], None],
        is_worth: IsWorth,
        is_busy: Callable[[int], bool],
    ) -> None:
        """Makes one without copies.

        Args:
            config: how it is copied.
            block_size: tokens in a block.
            tiers: the nearest one first.
            counts: what was done with each of them, by name.
            worth: what a block is worth, by the eviction policy.
            free_block: gives a block of the device back to its pool.
            is_worth: whether it is worth the copy.
            is_busy: whether something is on its way into a tier.
        """
        self.num_leaving_blocks = 0
        """Blocks of the device that are evicted and will be free when they have been copied."""
        self.num_copying_blocks = 0
        """Blocks of the device that are being copied and are not leaving: evicting them frees nothing at once."""
        self._config = config
        self._size = block_size
        self._tiers = tiers
        self._counts = counts
        self._worth = worth
        self._free_block = free_block
        self._is_worth = is_worth
        self._is_busy = is_busy
        self._outbound: dict[bytes, Copy] = {}
        """Copies from the device, queued or under way."""
        self._urgent: list[deque[Copy]] = [deque() for _ in tiers]
        """For each tier, copies into it whose place somebody waits for."""
        self._idle: deque[Copy] = deque()
        """Copies into the first tier that nobody waits for."""
        self._flush = FlushQueue(tiers, lambda count: is_worth(len(tiers) - 1, count, 0))

    # ---- what the device pool does ----

    def released(self, path: Sequence[RadixNode]) -> None:
        """A request or a lock lets go of these nodes: they have a new rating, and may be copied down."""
        below = self._tiers[0]
        fresh: list[RadixNode] = []
        for node in path:
            if not node.is_ready:
                break
            entry = below.find(content_id(node))
            if entry is not None:
                below.rate(entry, self._worth(node))
            elif node.content_id not in self._outbound:
                fresh.append(node)
        if self._config.write_back == "incremental":
            for run in runs_of(fresh):
                if self._is_worth(0, len(run), depth_of(run[0]) * self._size):
                    self._idle.extend(self._copy(node) for node in run)

    def evicted(self, nodes: Sequence[RadixNode], *, may_wait: bool) -> None:
        """Takes nodes that have left the tree, in that order. Their blocks are free now, or when they are copied.

        `may_wait`: whoever needs the blocks can wait for that.
        """
        below = self._tiers[0]
        fresh = []
        for node in nodes:
            found = content_id(node)
            entry, copy = below.find(found), self._outbound.get(found)
            if copy is not None and copy.source_id == node.block_id and not copy.is_leaving:
                if copy.entry is not None:
                    copy.is_leaving = True
                    self.num_leaving_blocks += 1
                    self.num_copying_blocks -= 1
                    continue
                copy.is_cancelled = True
                del self._outbound[found]
            elif entry is not None or copy is not None:
                if entry is not None:
                    below.rate(entry, self._worth(node))
                self._free_block(node.block_id)
                continue
            fresh.append(node)
        fresh.reverse()  # the end of a prefix is evicted before its beginning
        for run in runs_of(fresh):
            if may_wait and self._is_worth(0, len(run), depth_of(run[0]) * self._size):
                for node in reversed(run):
                    copy = self._copy(node)
                    copy.is_leaving = True
                    self._urgent[0].append(copy)
                self.num_leaving_blocks += len(run)
            else:
                self._counts[0]["dropped"] += len(run)
                for node in reversed(run):
                    self._free_block(node.block_id)

    def flush(self, cached: Iterable[RadixNode]) -> None:
        """Begins to copy down all that the last tier lacks, if that outlives the engine: `cached` and what is below."""
        self._flush.begin()
        if self._flush.is_active:
            below, last = self._tiers[0], len(self._tiers) - 1
            fresh = [n for n in cached if below.find(content_id(n)) is None and n.content_id not in self._outbound]
            for run in runs_of(fresh):
                if self._is_worth(last, len(run), depth_of(run[0]) * self._size):
                    self._idle.extend(self._copy(node) for node in run)

    # ---- transfers ----

    def take(self, index: int) -> list[Copy]:
        """The copies that go into a tier now, all from one place, with slots for them; none if they have to wait."""
        copies: list[Copy] = []
        queues = (self._urgent[0], self._idle) if index == 0 else (self._urgent[index],)
        for queue in queues:
            while queue and len(copies) < self._config.max_transfer_blocks:
                if not self._admit_copy(index, queue[0], copies):
                    return copies
                queue.popleft()
        if self._flush.is_active and index == len(self._tiers) - 1:
            most = self._config.max_transfer_blocks
            self._flush.fill(copies, most, lambda key: self._make_room(index, key, forced=False))
        return copies

    def stored(self, index: int, copy: Copy, *, ok: bool) -> None:
        """Books a copy into a tier that is done, or has failed."""
        assert copy.entry is not None
        if ok:
            self._tiers[index].arrived(copy.entry)
            self._flush.arrived(copy.content_id)
        else:
            self._tiers[index].discard(copy.entry)
        if copy.origin is not None:
            tier, entry = copy.origin
            self._tiers[tier].release(entry)
            if not ok:
                self._tiers[tier].discard_idle(entry)  # it was about to leave; trying again might never end
            return
        del self._outbound[copy.content_id]
        if copy.is_leaving:
            self.num_leaving_blocks -= 1
            self._free_block(copy.source_id)
        else:
            self.num_copying_blocks -= 1

    def leaving_block_ids(self) -> list[int]:
        """The blocks of the device that are neither free nor in the tree. For checks."""
        return [copy.source_id for copy in self._outbound.values() if copy.is_leaving]

    def urgent_copies(self) -> Iterator[Copy]:
        """Queued copies whose places somebody waits for. For checks."""
        return chain.from_iterable(self._urgent)

    def check_invariants(self, flying: Sequence[Copy]) -> None:
        """Raises AssertionError if a copy is lost or a count is wrong. `flying`: copies under way."""
        queued = chain(flying, self.urgent_copies(), self._idle)
        live = [copy for copy in queued if copy.origin is None and not copy.is_cancelled]
        assert {id(copy) for copy in live} == {id(c) for c in self._outbound.values()}, "a copy from the device is lost"
        assert self.num_leaving_blocks == len(self.leaving_block_ids()), "wrong count of leaving blocks"
        num_copying = sum(copy.entry is not None and not copy.is_leaving for copy in live)
        assert self.num_copying_blocks == num_copying, "wrong count of blocks that are being copied"

    # ---- parts of these ----

    def _copy(self, node: RadixNode) -> Copy:
        assert node.parent is not None
        copy = Copy(content_id(node), content_id(node.parent), self._worth(node), node.block_id, None)
        self._outbound[copy.content_id] = copy
        return copy

    def _admit_copy(self, index: int, copy: Copy, copies: list[Copy]) -> bool:
        """Puts a copy among those that start now, or gives it up; False if it has to wait for a slot."""
        store = self._tiers[index]
        # Copies into further tiers start from an only device or host copy; transfers from two sources are not mixed.
        if copies and (copies[0].origin is None) != (copy.origin is None):
            return False
        if copy.is_cancelled:
            return True
        forced = copy.is_leaving or copy.origin is not None
        fits = self._make_room(index, key_of(copy.worth), forced=forced)
        if fits is None:
            return False
        if fits:
            copy.entry = store.insert(copy.content_id, copy.parent_id, copy.worth)
            self.num_copying_blocks += not forced
            copies.append(copy)
        else:
            del self._outbound[copy.content_id]
        return True

    def _make_room(self, index: int, key: Key, *, forced: bool) -> bool | None:
        """Whether a block of this worth gets a slot: None if it has to wait, False if all that is there is worth more.

        `forced`: it gets one in any case.
        """
        store, below = self._tiers[index], index + 1
        while not store.num_free_blocks:
            victim = store.victim()
            if victim is None:
                return None
            if not forced and victim.key >= key:
                return False
            num_waiting = len(self._urgent[index]) + (len(self._idle) if index == 0 else 0)
            run = store.run_above(victim, min(self._config.max_transfer_blocks, num_waiting))
            if below == len(self._tiers) or self._tiers[below].find(victim.content_id) is not None:
                store.discard(victim)
            elif self._urgent[below] or self._is_busy(below):
                return None
            elif not self._is_worth(below, len(run), 0):
                self._counts[below]["dropped"] += 1
                store.discard(victim)
            else:
                for entry in run:
                    if self._tiers[below].find(entry.content_id) is not None:
                        break
                    store.acquire(entry)
                    down = Copy(entry.content_id, entry.parent_id, entry.worth, entry.slot, (index, entry))
                    self._urgent[below].append(down)
                return None
        return True

"""KV of agents that are about to call, loaded from lower tiers before they do (ScaleSim, section 4.3).

A prefetch is a load like that of a request, but nobody waits for it: it goes behind all loads that somebody waits for,
in the order of the distances, and its blocks come out of free memory or that of sessions that are worth less. The
blocks are pending in the tree meanwhile, so a call that comes too early waits for them and computes nothing twice; the
load then has the call's priority.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from agentserve.core.memory.eviction import Key, SessionBlocks
from agentserve.core.memory.load_queue import Urgency, urgency_at

if TYPE_CHECKING:
    from agentserve.core.memory.manager import MemoryManager

MAX_PREFETCHES = 2
"""Under way at once: one is copied, and the next one follows without a gap."""

_NUM_DISTANCE = 2
"""The first numbers of a key: rank and distance. What follows, the time of the last use, gives nobody's place away."""


class PrefetchOutcome(Enum):
    """What came of an attempt."""

    STARTED = "started"
    NOTHING = "nothing"  # all of it is on the device, or in no tier, or is computed sooner
    NO_ROOM = "no_room"  # what is on the device is worth as much


@dataclass(slots=True)
class _Prefetch:
    session: SessionBlocks
    token_ids: list[int]
    is_awaited: bool = False
    """Whether a call waits for it."""
    is_partial: bool = False
    """Whether there was no room for more, or it was cut short: the rest is to be loaded later."""
    is_cut: bool = False
    """Whether it ends with the piece under way."""


class Prefetches:
    """The prefetches under way in one memory. Needs tiers."""

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._active: dict[str, _Prefetch] = {}
        self._num_started = 0
        self.num_blocks = 0
        """Blocks that have come."""

    def __contains__(self, name: str) -> bool:
        return name in self._active

    @property
    def is_full(self) -> bool:
        """Whether the next one has to wait until one is over."""
        return len(self._active) >= MAX_PREFETCHES

    def has_room(self, key: Key) -> bool:
        """Whether there may be a block for what is worth `key`: a free one, or one of something that is worth less."""
        first = self._memory.order.first_key()
        return self._memory.num_free_blocks > 1 or (first is not None and first[:_NUM_DISTANCE] < key[:_NUM_DISTANCE])

    def start(
        self, session: SessionBlocks, distance: float, max_blocks: int, *, num_kept_free: int = 0
    ) -> PrefetchOutcome:
        """Loads what lower tiers have of the path that a session used last, or as much of it as there is room for.

        Args:
            session: whose blocks; its group says what they are worth.
            distance: its place among the prefetches; the smallest is loaded first.
            max_blocks: free or evictable blocks that it may take.
            num_kept_free: free blocks that it leaves to requests that grow: they cannot wait until one is copied down.
        """
        memory, size, path = self._memory, self._memory.block_size, session.path
        if not path or path[-1].is_in_tree:  # the end of a path leaves first
            return PrefetchOutcome.NOTHING
        token_ids = [token for node in path for token in node.key]
        salt = path[0].salt
        urgency = urgency_at(distance)
        found = memory.loadable(token_ids, salt=salt, urgency=urgency)
        if found is None:
            return PrefetchOutcome.NOTHING
        num_ready, num_found = found
        # One block more than is loaded: a request has a token behind what is cached.
        num_new = min(num_found + 1, max_blocks)
        if num_new >= 2:
            room = memory.make_room_before(num_new + num_kept_free, session.group.key[:_NUM_DISTANCE])
            num_new = min(num_new, room - num_kept_free)
        if num_new < 2:
            return PrefetchOutcome.NO_ROOM
        token_ids = token_ids[: (num_ready + num_new - 1) * size]
        name = f"\0prefetch/{self._num_started}"
        self._num_started += 1
        allocation = memory.allocate(
            name, [*token_ids, 0], salt=salt, session=session, ignore_pins=True, urgency=urgency
        )
        if not allocation.num_loading_tokens:
            if memory.holds(name):
                memory.free(name)
            return PrefetchOutcome.NOTHING
        self._active[name] = _Prefetch(session, token_ids, is_partial=num_new <= num_found)
        return PrefetchOutcome.STARTED

    def hurry(self, name: str, urgency: Urgency) -> None:
        """A call waits for a prefetch: it is a load like any other from now on."""
        assert self._memory.residency is not None, "there are no tiers"
        self._active[name].is_awaited = True
        self._memory.residency.hurry(name, urgency)

    def give_way(self) -> bool:
        """Cuts the prefetches short that no call waits for: a call needs their blocks. Whether that will free some.

        They are free once the pieces under way have come.
        """
        is_cut = False
        for name, prefetch in list(self._active.items()):
            if prefetch.is_awaited:
                continue
            is_cut = True
            if not prefetch.is_cut:
                prefetch.is_cut = prefetch.is_partial = True
                if self._memory.abort_load(name):
                    self.advanced(name, 0, is_over=True)
        return is_cut

    def advanced(self, name: str, num_blocks: int, *, is_over: bool) -> None:
        """A piece of a prefetch has come, or failed: whatever is there now is cached."""
        prefetch, memory = self._active[name], self._memory
        num_tokens = memory.num_computed_tokens(name) + num_blocks * memory.block_size
        memory.commit(name, [*prefetch.token_ids, 0], num_tokens)
        self.num_blocks += num_blocks
        if not is_over:
            return
        del self._active[name]
        before = prefetch.session.path
        memory.free(name)
        # What was not loaded still belongs to the history of the session.
        prefetch.session.path = [*prefetch.session.path, *before[len(prefetch.session.path) :]]
        if prefetch.is_partial and memory.losers is not None:
            memory.losers[prefetch.session] = None

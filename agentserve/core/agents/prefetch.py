"""Which sessions are to be loaded before they call, the nearest one first."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.prefetch import PrefetchOutcome


class PrefetchQueue:
    """Waits for room and for the link. Costs O(1) while the nearest session has no room, else O(log n) a session."""

    def __init__(self, memory: MemoryManager, registry: AgentRegistry) -> None:
        self._memory = memory
        self._registry = registry
        self._heap: list[tuple[float, int, Session]] = []
        self._distances: dict[str, tuple[float, int]] = {}
        """Of every session that is or was to be loaded and has not called since; other entries of the heap are
        outdated. And its number, which decides between equal distances."""
        self._num_added = 0
        self._refused: tuple[int, int, int, int] | None = None
        """Who got no room, and the state of things then: asking again is not free."""

    def __bool__(self) -> bool:
        return bool(self._heap or self._memory.losers)

    def add(self, session: Session, distance: float) -> None:
        """Wants a session on the device; its last distance counts."""
        self._num_added += 1
        place = self._distances[session.session_id] = (distance, self._num_added)
        heapq.heappush(self._heap, (*place, session))

    def start(
        self, is_wanted: Callable[[Session], bool], num_calls: int, num_claimed_blocks: Callable[[], int]
    ) -> None:
        """Starts the prefetches that there is room for.

        Args:
            is_wanted: whether a session is still to be loaded.
            num_calls: requests that have come; who got no room asks again when that or the memory has changed.
            num_claimed_blocks: blocks that requests may need which have come; a prefetch takes what they leave.
        """
        self._take_losers()
        prefetches = self._memory.prefetches
        while self._heap and not prefetches.is_full:
            distance, number, session = self._heap[0]
            is_current = self._distances.get(session.session_id) == (distance, number)
            if not is_current or not session.is_idle or not is_wanted(session):
                heapq.heappop(self._heap)
                if is_current:
                    del self._distances[session.session_id]
                continue
            state = (number, self._memory.num_available_blocks, self._memory.num_free_blocks, num_calls)
            if state == self._refused or not prefetches.has_room(session.blocks.group.key):
                return
            # Those that cannot be admitted now get their memory first, else they would throw out what was loaded.
            room = state[1] - num_claimed_blocks()
            outcome = prefetches.start(session.blocks, distance, room, num_kept_free=num_calls)
            if outcome is PrefetchOutcome.NO_ROOM:
                self._refused = state
                return
            heapq.heappop(self._heap)

    def _take_losers(self) -> None:
        """Those that were to be on the device and have lost blocks wait again."""
        losers = self._memory.losers
        if not losers:
            return
        for blocks in losers:
            place = self._distances.get(blocks.session_id)
            session = self._registry.sessions.get(blocks.session_id)
            if place is not None and session is not None and session.is_idle:
                # In its old place: the adapters come in the same order, and a call needs both.
                heapq.heappush(self._heap, (*place, session))
        losers.clear()

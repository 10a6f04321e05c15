"""What must be written before the engine ends, so that a tier that outlives it holds all that is worth keeping."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from agentserve.core.memory.copies import Copy
from agentserve.core.memory.eviction import Key, key_of
from agentserve.core.memory.tiers import TierEntry, TierStore
from agentserve.core.transfers import Tier


class FlushQueue:
    """Blocks of the upper tiers on their way to the last one. They keep their places, and are copied while links are
    idle: what has left its place when its turn comes is passed over."""

    def __init__(self, tiers: Sequence[TierStore], is_worth: Callable[[int], bool]) -> None:
        """`is_worth`: whether loading so many blocks from the last tier beats computing them."""
        self._above, self._last = tiers[:-1], tiers[-1]
        self._is_worth = is_worth
        self._waiting: deque[bytes] = deque()
        self.is_active = False
        """Whether what arrives in an upper tier is to go on to the last one."""

    def begin(self) -> None:
        """Lists all that the last tier lacks: what is worth most first, and no block before those it depends on.

        Nothing if the last tier ends with the engine. O(n log n) for n blocks.
        """
        if self._last.tier is not Tier.DISK:
            return
        self.is_active = True
        entries = {entry.content_id: entry for store in self._above for entry in store.entries() if entry.is_ready}
        listed: set[bytes] = set()
        for entry in sorted(entries.values(), key=lambda entry: (entry.key, entry.sequence), reverse=True):
            run = []
            above: TierEntry | None = entry
            while above is not None and above.content_id not in listed:
                run.append(above.content_id)
                listed.add(above.content_id)
                above = entries.get(above.parent_id)
            if run and self._is_worth(len(run)):
                self._waiting.extend(reversed(run))

    def arrived(self, content_id: bytes) -> None:
        """A block has come to an upper tier."""
        if self.is_active:
            self._waiting.append(content_id)

    def fill(self, copies: list[Copy], most: int, make_room: Callable[[Key], bool | None]) -> None:
        """Adds copies to a transfer into the last tier, up to `most`, unless it copies from the device.

        `make_room` makes a slot free for something of this worth: False if all that is there is worth more, None if it
        has to wait.
        """
        if copies and copies[0].origin is None:
            return
        while len(copies) < most and self._waiting:
            copy = self._copy(self._waiting.popleft())
            fits = copy is not None and make_room(key_of(copy.worth))
            if copy is None or fits is False:
                continue
            if fits is None:
                self._waiting.appendleft(copy.content_id)
                return
            assert copy.origin is not None
            self._above[copy.origin[0]].acquire(copy.origin[1])
            copy.entry = self._last.insert(copy.content_id, copy.parent_id, copy.worth)
            copies.append(copy)

    def _copy(self, content_id: bytes) -> Copy | None:
        """A copy from the nearest tier that has the block; None if none has it, or the last one has."""
        if self._last.find(content_id) is not None:
            return None
        for index, store in enumerate(self._above):
            entry = store.find(content_id)
            if entry is not None and entry.is_ready:
                return Copy(content_id, entry.parent_id, entry.worth, entry.slot, (index, entry))
        return None

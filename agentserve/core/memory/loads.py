"""Loads of the prefix cache: blocks of lower tiers on their way to requests that wait for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from agentserve.core.memory.load_queue import Urgency
from agentserve.core.memory.tiers import TierEntry, TierStore

Place: TypeAlias = tuple[int, TierEntry]
"""A tier by its index, and a block in it."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A transfer for a request is done."""

    request_id: str
    num_blocks: int
    """Blocks that came; they follow those that had come before. 0 after an error."""
    is_over: bool
    """Nothing more will come."""


class Load:
    """What one request waits for."""

    __slots__ = ("items", "num_done", "num_flying", "order", "request_id")

    def __init__(self, request_id: str, order: tuple[Urgency, int], items: list[tuple[int, TierEntry, int]]) -> None:
        self.request_id = request_id
        self.order = order
        """Urgency and sequence: the smallest goes next."""
        self.items = items
        """Tier, block in it, and block of the device, in the order of the tokens."""
        self.num_done = 0
        self.num_flying = 0

    @property
    def next_tier(self) -> int | None:
        """The tier that its next transfer reads; None while one is under way."""
        return None if self.num_flying else self.items[self.num_done][0]

    @property
    def flying(self) -> list[tuple[int, TierEntry, int]]:
        """The items under way."""
        return self.items[self.num_done : self.num_done + self.num_flying]


class BlockLoads:
    """Loads of blocks, cut in pieces. The blocks that a load will read stay locked in their tiers."""

    def __init__(self, tiers: Sequence[TierStore], max_blocks: int) -> None:
        """`max_blocks`: of one piece."""
        self._tiers = tiers
        self._max_blocks = max_blocks
        self._loads: dict[str, Load] = {}
        self._sequence = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._loads

    def backlog(self, urgency: Urgency) -> Counter[int]:
        """Blocks that are read before what is so urgent, by tier."""
        ahead = [load for load in self._loads.values() if load.order[0] <= urgency]
        return Counter(tier for load in ahead for tier, _, _ in load.items[load.num_done :])

    def begin(self, request_id: str, places: Iterable[Place], block_ids: Iterable[int], urgency: Urgency) -> None:
        """Queues a load into these blocks of the device. Of equally urgent ones the earlier goes first."""
        items = [(tier, entry, block_id) for (tier, entry), block_id in zip(places, block_ids, strict=True)]
        assert items and request_id not in self._loads, f"{request_id!r}: nothing to load, or a load already"
        for tier, entry, _ in items:
            self._tiers[tier].acquire(entry)
        self._sequence += 1
        self._loads[request_id] = Load(request_id, (urgency, self._sequence), items)

    def hurry(self, request_id: str, urgency: Urgency) -> None:
        """Somebody waits for the load: it goes before those that are less urgent."""
        load = self._loads.get(request_id)
        if load is not None:
            load.order = min(load.order, (urgency, load.order[1]))

    def abort(self, request_id: str) -> bool:
        """Cuts a load short. True if it is over now; False if it will be when the piece under way is done."""
        load = self._loads[request_id]
        self._cut(load, load.num_done + load.num_flying)
        if load.num_flying:
            return False
        del self._loads[request_id]
        return True

    def next_on(self, tier: int) -> Load | None:
        """The most urgent load that would read this tier next."""
        if not self._loads:
            return None
        waiting = (load for load in self._loads.values() if load.next_tier == tier)
        return min(waiting, key=lambda load: load.order, default=None)

    def start_piece(self, request_id: str) -> Load:
        """The load, whose `flying` items are under way from now on."""
        load = self._loads[request_id]
        tier = load.items[load.num_done][0]
        end, most = load.num_done, load.num_done + self._max_blocks
        while end < min(most, len(load.items)) and load.items[end][0] == tier:
            end += 1
        load.num_flying = end - load.num_done
        return load

    def finish(self, load: Load, *, ok: bool) -> LoadProgress:
        """Books the piece of a load that was under way. After a failure the rest is given up."""
        piece = load.flying
        for tier, entry, _ in piece:
            self._tiers[tier].release(entry)
        if not ok:
            for tier, entry, _ in reversed(piece):
                self._tiers[tier].discard_idle(entry)  # it cannot be read: the next request shall not try again
        load.num_done += load.num_flying
        load.num_flying = 0
        if not ok:
            self._cut(load, load.num_done)
        is_over = load.num_done == len(load.items)
        if is_over:
            del self._loads[load.request_id]
        return LoadProgress(load.request_id, len(piece) if ok else 0, is_over)

    def locks(self) -> Counter[tuple[int, bytes]]:
        """How many locks it holds on each block: tier and content. For checks."""
        return Counter(
            (tier, entry.content_id) for load in self._loads.values() for tier, entry, _ in load.items[load.num_done :]
        )

    def _cut(self, load: Load, end: int) -> None:
        for tier, entry, _ in load.items[end:]:
            self._tiers[tier].release(entry)
        del load.items[end:]

"""The one queue of what is loaded onto the device, for all kinds of agent memory (ScaleSim, section 4.4).

ScaleSim derives each kind of agent memory from one class and orders the loads of all of them in one queue by invocation
distance. Here a module moves no bytes: it orders a copy, and is told when the copy is done. A load is made of copies,
and between two of them a more urgent one goes first: that is the preemption.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from agentserve.core.adapters import TransferOrder
from agentserve.core.queues import Rank, rank
from agentserve.core.request import Request
from agentserve.core.transfers import Tier

Urgency: TypeAlias = tuple[float, Rank]
"""Invocation distance (0: somebody waits), then the rank of who waits. The smallest goes first."""
_NOBODY = (sys.maxsize, 0, (), 0)


def urgency_of(request: Request) -> Urgency:
    """How urgent it is to load what a request waits for."""
    return 0.0, rank(request)


def urgency_at(distance: float) -> Urgency:
    """How urgent it is to load what nobody waits for, at this distance."""
    return max(0.0, distance), _NOBODY


@dataclass(frozen=True, slots=True)
class LoadTask:
    """A load that can go on now."""

    name: str
    """Of the object, or of who waits for it; the module knows it by that."""
    urgency: Urgency


class MemoryModule(Protocol):
    """One kind of agent memory, as the queue sees it (the paper's table 1; what else a module can do is its own)."""

    def next_load(self, link: Tier) -> LoadTask | None:
        """The most urgent load over this link that can go on, started or not (`DispatchLoadTasks`). It costs O(1) if
        there is none."""
        ...

    def load(self, link: Tier, name: str) -> TransferOrder:
        """The next copy of that load, which is under way from then on (`Load`). Makes room by the module's own order
        (`Evict`)."""
        ...

    def preempted(self, name: str) -> None:
        """A load that has started is interrupted by a more urgent one; it goes on behind that, or loses its place."""
        ...


class LoadQueue:
    """The loads of all modules: on each link one copy at a time, that of the most urgent load.

    Loads that compete for a link would all come late, therefore one follows the other. Of equally urgent ones the load
    goes on that has begun, else the modules take turns: an agent needs all kinds of its memory.
    """

    def __init__(self) -> None:
        self._modules: list[MemoryModule] = []
        self._busy: set[Tier] = set()
        """Links on which a copy is under way."""
        self._last: dict[Tier, tuple[MemoryModule, str]] = {}
        """For each link the load that was worked on last."""
        self._begun: set[Tier] = set()
        """Links where that one is not over."""

    def add(self, module: MemoryModule) -> None:
        """Lets a module load. Of equally urgent loads that of the module that was added last goes first."""
        self._modules.insert(0, module)

    def start(self, link: Tier) -> TransferOrder | None:
        """The next copy over a link, if none is under way and there is something to load."""
        if link in self._busy:
            return None
        found: tuple[MemoryModule, LoadTask] | None = None
        for module in self._modules:
            task = module.next_load(link)
            if task is not None and (found is None or self._is_before(link, (module, task), found)):
                found = (module, task)
        if found is None:
            return None
        module, task = found
        before = self._last.get(link)
        if link in self._begun and before is not None and before != (module, task.name):
            before[0].preempted(before[1])
        self._last[link] = (module, task.name)
        self._begun.add(link)
        self._busy.add(link)
        return module.load(link, task.name)

    def finished(self, link: Tier, *, is_over: bool) -> None:
        """The copy under way on a link is done; `is_over`: and so is the load that it was a part of."""
        self._busy.remove(link)
        if is_over:
            self._begun.discard(link)

    def _is_before(self, link: Tier, one: tuple[MemoryModule, LoadTask], other: tuple[MemoryModule, LoadTask]) -> bool:
        if one[1].urgency != other[1].urgency:
            return one[1].urgency < other[1].urgency
        last = self._last.get(link)
        if last is None:
            return False
        if link in self._begun and last in ((one[0], one[1].name), (other[0], other[1].name)):
            return last == (one[0], one[1].name)
        return last[0] is other[0]

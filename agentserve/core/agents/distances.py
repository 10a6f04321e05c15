"""Invocation distances: how far each agent is from its next call (ScaleSim, section 4.2).

The rules, for an agent with the distance D:

- While a call of it waits or runs, D is 0.
- What `SetDistances` says of it replaces D; relative numbers are added to a D that is known. D is never below 0. Said
  while a call is open, it holds for the time after it.
- Its call uses D up. What the call says about the next one holds from its end on; else D is unknown, which is farther
  than any number.
- A call that comes shows that the application has got further: everybody who waits comes nearer by the D that it had,
  but by no more than the D of the nearest one of them. A call that was not due thus moves nobody past his turn.
- Who does not call when his turn has come is late, or never calls again. He holds the others back until `MAX_EARLY`
  times as many have called ahead of their turns as are missing: then it is not they who are early. After that nobody
  waits for him any more.

All distances are kept as positions on a line, with the point that has been reached, so to come nearer is one addition.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import TypeAlias
from weakref import ref

from agentserve.core.agents.registry import Session

MAX_AGENTS = 65_536
"""Agents whose distances are remembered; those told longest ago are forgotten first."""
MAX_EARLY = 2
"""Agents that are taken to be early for each one that may be late."""
_START = 1.0
"""The line's beginning: above 0, which is the place of those who wait."""
_MIN_COMPACTION = 64
_FEW = 8
"""Of what is new in a heap: fewer than one in so many."""


Place: TypeAlias = tuple[float, str]
"""A position on the line, and the agent who is there."""


class DistanceBook:
    """The distances of all agents. What is said of an agent costs a look into a dictionary if it changes nothing, else
    O(log n) later, when somebody wants to know who is nearest."""

    def __init__(self) -> None:
        self.reached = _START
        """The point of the line where distances are 0."""
        self._positions: dict[str, float] = {}
        """By agent; who was told longest ago that something has changed comes first."""
        self._sessions: dict[str, tuple[ref[Session], ...]] = {}
        self._nearest: list[Place] = []
        """A heap of the positions of agents without open calls; an entry is outdated when the position differs. Those
        whose turn has come are not in it."""
        self._new: list[Place] = []
        """What is not in the heap yet."""
        self._due: set[str] = set()
        """Agents without open calls whose turn has come, and without whom nobody comes nearer."""
        self._ahead: dict[str, float] = {}
        """Agents whose last call came before its turn, and the position of that."""
        self._ahead_heap: list[Place] = []
        """The same as a heap; an entry is outdated when the position differs."""
        self._num_open: dict[str, int] = {}
        self._max_named = 2 * MAX_AGENTS
        """With more names than that, those without a session are forgotten."""

    def position(self, agent: str) -> float:
        """Where it is; infinite: unknown. Smaller is nearer, also beside agents that have passed their time."""
        return max(self.reached, self._positions.get(agent, math.inf))

    def distance(self, agent: str) -> float:
        """D: 0 while a call is open, infinite if it is unknown."""
        return 0.0 if agent in self._num_open else self.position(agent) - self.reached

    def is_at(self, place: Place) -> bool:
        """Whether this was the last that was said of an agent without open calls."""
        return self._positions.get(place[1]) == place[0] and place[1] not in self._num_open

    def sessions_of(self, agent: str) -> list[Session]:
        """The sessions of an agent that are remembered, in the order in which they came."""
        return [session for known in self._sessions.get(agent, ()) if (session := known()) is not None]

    def tell(self, agents: Iterable[tuple[str, float]], *, relative: bool = False) -> list[Place]:
        """Takes what somebody said; returns the new places of those without open calls for whom it changes something.

        Whole worlds are told at once, and most agents are where they were expected to be by then. A change of what is
        unknown says nothing.
        """
        positions, num_open, reached = self._positions, self._num_open, self.reached
        moved = []
        for agent, distance in agents:
            before = positions.get(agent)
            position = reached + (distance if distance > 0.0 else 0.0)
            if relative:
                if before is None:
                    continue
                position = max(reached, max(before, reached) + distance)
            if position == before:
                continue
            if before is not None:
                del positions[agent]  # it is among the last to be forgotten now
                self._due.discard(agent)
            positions[agent] = position
            if agent not in num_open:
                moved.append((position, agent))
        while len(positions) > MAX_AGENTS:
            forgotten = next(iter(positions))
            del positions[forgotten]
            self._due.discard(forgotten)
        self._new += moved
        if len(self._new) > _MIN_COMPACTION + 2 * len(positions):
            self._new = self._current(self._new)
        return moved

    def began(self, agent: str, session: Session) -> None:
        """A call has come."""
        position = self._positions.pop(agent, None)
        if agent not in self._num_open:
            self._num_open[agent] = 0
            if position is not None:
                self._called(agent, position)
        self._num_open[agent] += 1
        known = self._sessions.get(agent, ())
        if not any(other() is session for other in known):
            self._sessions[agent] = (*(other for other in known if other() is not None), ref(session))
            self._forget_sessions()

    def ended(self, agent: str, next_distance: float | None) -> Place | None:
        """A call has ended; where the agent is now, if it has no other one and that is known.

        What was said meanwhile counts more than what the call said.
        """
        self._num_open[agent] -= 1
        if self._num_open[agent]:
            return None
        del self._num_open[agent]
        if agent not in self._positions:
            if next_distance is None:
                return None
            self.tell([(agent, next_distance)])
        else:
            self._new.append((self._positions[agent], agent))
        return self._positions[agent], agent

    def push(self, heap: list[Place], place: Place) -> None:
        """Puts a place into a heap, which loses those that are outdated when they are most of it."""
        heapq.heappush(heap, place)
        if len(heap) > _MIN_COMPACTION + 2 * len(self._positions):
            heap[:] = self._current(heap)
            heapq.heapify(heap)

    def _called(self, agent: str, position: float) -> None:
        """A call has come of an agent that was expected there: how far the application has got by that."""
        self._due.discard(agent)
        self._ahead.pop(agent, None)
        if position <= self.reached:
            return
        self._ahead[agent] = position
        heapq.heappush(self._ahead_heap, (position, agent))
        if len(self._ahead_heap) > _MIN_COMPACTION + 2 * len(self._ahead):
            self._ahead_heap = sorted((position, agent) for agent, position in self._ahead.items())
        nearest = self._nearest_position()
        while self._ahead and len(self._ahead) > MAX_EARLY * len(self._due):
            self.reached = min(nearest, self._first_ahead())
            self._due.clear()
            while self._ahead and self._first_ahead() <= self.reached:
                del self._ahead[heapq.heappop(self._ahead_heap)[1]]
            nearest = self._nearest_position()

    def _is_ahead(self, place: Place) -> bool:
        return self._ahead.get(place[1]) == place[0]

    def _first_ahead(self) -> float:
        """The position of the call that was the least ahead of its turn. There must be one."""
        while not self._is_ahead(self._ahead_heap[0]):
            heapq.heappop(self._ahead_heap)
        return self._ahead_heap[0][0]

    def _nearest_position(self) -> float:
        """Whose turn comes next; infinite: nobody's. Notes those whose turn has come."""
        add_places(self._nearest, self._new)
        self._new.clear()
        if len(self._nearest) > _MIN_COMPACTION + 2 * len(self._positions):
            self._nearest = self._current(self._nearest)
            heapq.heapify(self._nearest)
        while self._nearest:
            position, agent = self._nearest[0]
            if self.is_at((position, agent)):
                if position > self.reached:
                    return position
                self._due.add(agent)
            heapq.heappop(self._nearest)
        return math.inf

    def _current(self, places: list[Place]) -> list[Place]:
        return [place for place in dict.fromkeys(places) if self.is_at(place)]

    def _forget_sessions(self) -> None:
        if len(self._sessions) <= self._max_named:
            return
        self._sessions = {
            agent: known for agent, known in self._sessions.items() if any(session() is not None for session in known)
        }
        self._max_named = 2 * max(MAX_AGENTS, len(self._sessions))


def add_places(heap: list[Place], places: list[Place]) -> None:
    """Puts places into a heap: one by one if they are few, else all at once."""
    if len(places) * _FEW < len(heap):
        for place in places:
            heapq.heappush(heap, place)
    elif places:
        heap += places
        heapq.heapify(heap)

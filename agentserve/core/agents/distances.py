"""Invocation distances: how far each agent is from its next call (ScaleSim, section 4.2).

The rules, for an agent with the distance D:

- While a call of it waits or runs, D is 0.
- What `SetDistances` says of it replaces D; relative numbers are added to a D that is known. D is never below 0. Said
  while a call is open, it holds for the time after it.
- Its call uses D up. What the call says about the next one holds from its end on; else D is unknown, which is farther
  than any number.
- A call that comes shows that the application has got further: everybody who waits comes nearer by the D that it had,
  but by no more than the D of the nearest one of them. A call that was not due thus moves nobody past his turn.

All distances are kept as positions on a line, with the point that has been reached, so the last rule is one addition.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from weakref import WeakValueDictionary

from agentserve.core.agents.registry import Session

MAX_AGENTS = 65_536
"""Agents whose distances are remembered; those told longest ago are forgotten first."""
_START = 1.0
"""The line's beginning: above 0, which is the place of those who wait."""
_MIN_COMPACTION = 64


class DistanceBook:
    """The distances of all agents. Each change costs O(log n)."""

    def __init__(self) -> None:
        self.reached = _START
        """The point of the line where distances are 0."""
        self._positions: OrderedDict[str, float] = OrderedDict()
        self._sessions: dict[str, WeakValueDictionary[str, Session]] = {}
        self._nearest: list[tuple[float, str]] = []
        """A heap of the positions of agents without open calls; an entry is outdated when the position differs."""
        self._num_open: dict[str, int] = {}

    def position(self, agent: str) -> float:
        """Where it is; infinite: unknown. Smaller is nearer, also beside agents that have passed their time."""
        return max(self.reached, self._positions.get(agent, math.inf))

    def distance(self, agent: str) -> float:
        """D: 0 while a call is open, infinite if it is unknown."""
        return 0.0 if agent in self._num_open else self.position(agent) - self.reached

    def sessions_of(self, agent: str) -> list[Session]:
        """The sessions of an agent that are remembered, in the order in which they came."""
        return list(self._sessions.get(agent, {}).values())

    def set(self, agent: str, distance: float, *, relative: bool = False) -> bool:
        """Takes what somebody said; whether it says anything: a change of what is unknown does not."""
        if relative:
            known = self.position(agent) - self.reached
            if math.isinf(known):
                return False
            distance += known
        self._positions[agent] = position = self.reached + max(0.0, distance)
        self._positions.move_to_end(agent)
        if len(self._positions) > MAX_AGENTS:
            self._positions.popitem(last=False)
        self._list(agent, position)
        return True

    def began(self, agent: str, session: Session) -> None:
        """A call has come."""
        if agent not in self._num_open:
            advance = self.distance(agent)
            self._num_open[agent] = 0
            if math.isfinite(advance):
                self.reached += min(advance, self._nearest_distance())
        self._num_open[agent] += 1
        self._positions.pop(agent, None)
        self._sessions.setdefault(agent, WeakValueDictionary())[session.session_id] = session

    def ended(self, agent: str, next_distance: float | None) -> None:
        """A call has ended. What was said meanwhile counts more than what the call said."""
        self._num_open[agent] -= 1
        if self._num_open[agent]:
            return
        del self._num_open[agent]
        if agent in self._positions:
            self._list(agent, self._positions[agent])
        elif next_distance is not None:
            self.set(agent, next_distance)

    def _nearest_distance(self) -> float:
        """The smallest D of an agent without open calls; infinite if there is none."""
        while self._nearest:
            position, agent = self._nearest[0]
            if agent not in self._num_open and self._positions.get(agent) == position:
                return max(0.0, position - self.reached)
            heapq.heappop(self._nearest)
        return math.inf

    def _list(self, agent: str, position: float) -> None:
        if agent in self._num_open:
            return
        if len(self._nearest) > _MIN_COMPACTION + 2 * len(self._positions):
            self._nearest = [item for item in self._nearest if self._positions.get(item[1]) == item[0]]
            heapq.heapify(self._nearest)
        heapq.heappush(self._nearest, (position, agent))

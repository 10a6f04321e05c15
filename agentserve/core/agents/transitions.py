"""Which agent follows which: counts of what was seen, and what they say about what comes (CacheScout, equations 2-8).

Transitions are counted between the calls of one task. Tasks share the counts: they are instances of one application.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

EPSILON = 0.1
"""Added to each count, equation 3."""
MIN_EDGE = 0.1
"""tau of equation 7: a less likely successor is no edge of the graph."""
MAX_HOPS = 8
"""E_max of equation 8: what is so many calls away, or more, is not expected."""
MAX_AGENTS = 1024
"""Agents with successors that are remembered; the one that was seen longest ago is forgotten first."""
MAX_SUCCESSORS = 64
"""Of one agent."""
MAX_REACH = 16
"""Agents that are looked for around one, the nearest and most seen ones."""
_MAX_ROW_COUNT = 512
"""Counts of one agent are halved at this sum, or beyond `MAX_SUCCESSORS`: what is new counts for more."""


def _weight(count: int) -> float:
    return count * math.log(count) if count else 0.0


class Transitions:
    """A sparse matrix of counts, and a graph of its likely entries. Learning costs O(successors of one agent)."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, Counter[str]] = OrderedDict()
        self._totals: dict[str, int] = {}
        self._stays: Counter[str] = Counter()
        self._columns: Counter[str] = Counter()
        self._num_seen = 0
        # Sums of c * ln(c) over cells, rows and columns: entropies follow from them without going over the matrix.
        self._cell_weight = self._row_weight = self._column_weight = 0.0
        self._edges: dict[str, tuple[str, ...]] = {}
        self._hops: dict[str, Mapping[str, int]] = {}

    def add(self, agent: str, successor: str) -> None:
        """A call of `successor` followed one of `agent` in the same task. If that is the same agent, its tool was back:
        this counts for how soon it calls again, but not as a transition."""
        row = self._rows.get(agent)
        if row is None:
            row = self._rows[agent] = Counter()
            self._totals[agent] = 0
            if len(self._rows) > MAX_AGENTS:
                self._forget(next(iter(self._rows)))
        self._rows.move_to_end(agent)
        if agent == successor:
            self._stays[agent] += 1
        else:
            self._change(agent, successor, 1)
        self._age(agent, row)
        edges = tuple(other for other in row if self.probability(agent, other) >= MIN_EDGE)
        stays = self._stays[agent]
        if stays >= MIN_EDGE * (stays + self._totals[agent]):
            edges = (agent, *edges)
        if edges != self._edges.get(agent):
            self._edges[agent] = edges
            self._hops.clear()

    def _age(self, agent: str, row: Counter[str]) -> None:
        if self._stays[agent] >= _MAX_ROW_COUNT:
            self._stays[agent] //= 2
        if len(row) > MAX_SUCCESSORS or self._totals[agent] >= _MAX_ROW_COUNT:
            for other in list(row):
                self._change(agent, other, -((row[other] + 1) // 2))

    def probability(self, agent: str, successor: str) -> float:
        """Equation 3, over the successors that were seen and one that was not. 0 for an agent that nobody followed."""
        row = self._rows.get(agent)
        if row is None:
            return 0.0
        return (row[successor] + EPSILON) / (self._totals[agent] + EPSILON * (len(row) + 1))

    def next_agent(self, agent: str) -> str | None:
        """The most likely successor, equation 5; of equal ones that which was seen first. None: no idea."""
        row = self._rows.get(agent)
        return max(row, key=row.__getitem__) if row else None

    @property
    def entropy_reduction(self) -> float:
        """How much the present agent tells about the next one: 0 nothing, 1 everything. Equation 2."""
        num = self._num_seen
        if num == 0:
            return 0.0
        marginal = math.log(num) - self._column_weight / num
        conditional = (self._row_weight - self._cell_weight) / num
        # One successor for everybody: there is nothing that could be told.
        return 0.0 if marginal <= 1e-9 else min(1.0, max(0.0, 1.0 - conditional / marginal))

    def hops_from(self, agent: str) -> Mapping[str, int]:
        """Agents within fewer than `MAX_HOPS` likely calls of this one, itself at the length
        of the shortest way back to it. Never changed afterwards."""
        hops = self._hops.get(agent)
        if hops is None:
            if agent not in self._rows:
                return MappingProxyType({agent: 1})
            hops = self._hops[agent] = self._search(agent)
        return hops

    def _search(self, agent: str) -> Mapping[str, int]:
        hops: dict[str, int] = {}
        front = [agent]
        for distance in range(1, MAX_HOPS):
            found = []
            for near in front:
                for other in self._edges.get(near, ()):
                    if other not in hops and len(hops) < MAX_REACH:
                        hops[other] = distance
                        found.append(other)
            front = found
        return MappingProxyType(hops)

    def _change(self, agent: str, successor: str, change: int) -> None:
        row, total, column = self._rows[agent], self._totals[agent], self._columns[successor]
        count = row[successor]
        self._cell_weight += _weight(count + change) - _weight(count)
        self._row_weight += _weight(total + change) - _weight(total)
        self._column_weight += _weight(column + change) - _weight(column)
        self._totals[agent] = total + change
        self._num_seen += change
        for counts, value in ((row, count + change), (self._columns, column + change)):
            if value:
                counts[successor] = value
            else:
                del counts[successor]

    def _forget(self, agent: str) -> None:
        for successor, count in list(self._rows[agent].items()):
            self._change(agent, successor, -count)
        del self._rows[agent], self._totals[agent], self._stays[agent]
        self._edges.pop(agent, None)
        self._hops.clear()


def survival(hops: int | None) -> float:
    """How likely what belongs to an agent is used again before it is evicted, equation 8. None: out of reach."""
    return 0.0 if hops is None else 1.0 - min(hops, MAX_HOPS) / MAX_HOPS

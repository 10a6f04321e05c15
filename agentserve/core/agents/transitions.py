"""Which agent follows which: counts of what was seen, and how much they tell about what comes (CacheScout, equations
2, 5 and 11).

Transitions are counted between the calls of one task. Tasks share the counts: they are instances of one application.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict

MAX_AGENTS = 1024
"""Agents with successors that are remembered; the one that was seen longest ago is forgotten first."""
MAX_SUCCESSORS = 64
"""Of one agent."""
_MAX_ROW_COUNT = 512
"""Counts of one agent are halved at this sum, or beyond `MAX_SUCCESSORS`: what is new counts for more."""


def _weight(count: int) -> float:
    return count * math.log(count) if count else 0.0


class Transitions:
    """A sparse matrix of counts. Learning costs O(1), but for the halving of counts."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, Counter[str]] = OrderedDict()
        self._totals: dict[str, int] = {}
        self._columns: Counter[str] = Counter()
        self._num_seen = 0
        # Sums of c * ln(c) over cells, rows and columns: entropies follow from them without going over the matrix.
        self._cell_weight = self._row_weight = self._column_weight = 0.0

    def add(self, agent: str, successor: str) -> None:
        """A call of `successor` followed one of `agent` in the same task. The same agent again is no transition: its
        tool was back."""
        if agent == successor:
            return
        row = self._rows.get(agent)
        if row is None:
            row = self._rows[agent] = Counter()
            self._totals[agent] = 0
            if len(self._rows) > MAX_AGENTS:
                self._forget(next(iter(self._rows)))
        self._rows.move_to_end(agent)
        self._change(agent, successor, 1)
        if len(row) > MAX_SUCCESSORS or self._totals[agent] >= _MAX_ROW_COUNT:
            for other in list(row):
                self._change(agent, other, -((row[other] + 1) // 2))

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
        del self._rows[agent], self._totals[agent]

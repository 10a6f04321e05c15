"""How soon each agent calls again in a task, from what was seen after the same last calls.

CacheScout counts which agent follows which and looks for the shortest way through the likely edges (equations 7 and 8).
That takes an unlikely short way for a likely one, and never sees that tasks end. Here the number of calls until an
agent's next one is measured itself, behind the last two agents that called and the number of calls of the last one:
a supervisor is at the same place after each worker, and only the worker before tells which one is next; and who has
called twice may be through. This is backed off to the last agent alone as in prediction by partial matching (Cleary and
Witten 1984): what was seen after it counts like `BACK_OFF` observations.

What takes longer than a few microseconds is a generator, which stops after each piece of about ten; it must be run to
its end before the next one begins.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

MAX_DISTANCE = 16
"""Calls of a task that are looked ahead. What is farther away is not expected."""
BACK_OFF = 2.0
"""Weight of the shorter context, in observations of the longer one."""
MAX_CONTEXTS = 4096
"""Remembered ones; that which was met longest ago is forgotten first."""
MAX_TARGETS = 16
"""Agents that are looked for after one context; those that were seen first."""
_MAX_COUNT = 256.0
"""Counts of a context are halved beyond this: what is new counts for more."""
MIN_COUNT = 2.0
"""Observations of the longer context below which it tells nothing."""
_MAX_CALLS = 3
"""Of one agent in a task that are told apart."""
_REFRESH, _MAX_NEW = 0.125, 16
"""Indices are worked out anew when this share of the visits is new, or so many of them are."""
_AGENTS_A_PIECE = 2
"""Whose indices are worked out in one piece."""
_CALLS_A_PIECE = 8
"""Earlier calls of a task that learn of one more in one piece; a quarter of them if they learn that it has ended."""
_NOTHING: Mapping[int, float] = MappingProxyType({})
NO_INDICES: Mapping[str, float] = MappingProxyType({})


class Context:
    """A point in tasks: who has called last. Counts by distance, in calls of the task from here on."""

    __slots__ = ("_due", "_indices", "num_met", "num_reached", "num_seen", "shorter")

    def __init__(self, shorter: Context | None) -> None:
        self.shorter = shorter
        """The same with one agent less; None: this is the shortest one."""
        self.num_reached = [0.0] * (MAX_DISTANCE + 1)
        """How often it is known who called at this distance, or that the task had ended by then."""
        self.num_seen: dict[str, dict[int, float]] = {}
        """By agent: how often its first call from here on was at this distance."""
        self.num_met = 0
        """How often a task came to this point."""
        self._indices = NO_INDICES
        self._due = 0.0
        """At so many visits the indices are worked out anew."""

    def saw(self, agent: str, distance: int) -> None:
        """The first call of an agent from here on came at a distance."""
        seen = self.num_seen.get(agent)
        if seen is not None:
            seen[distance] = seen.get(distance, 0.0) + 1.0
        elif len(self.num_seen) < MAX_TARGETS:
            self.num_seen[agent] = {distance: 1.0}

    @property
    def indices(self) -> Mapping[str, float]:
        """For each agent that may call how much is won for each call for which what it needs is kept from here on.

        The best of all times to give up: `max over n of P(T <= n) / E[min(T, n)]`, T the calls until the agent's next
        one. It is 1 for who comes next for sure, 1/n for who comes in n calls for sure; who never comes back is left
        out (the index of Gittins for one reward: keep what has the largest one). Never changed afterwards; as of the
        last `refresh`.
        """
        if self.shorter is not None and self.num_reached[1] < MIN_COUNT:
            return self.shorter.indices
        return self._indices

    def refresh(self) -> Iterator[None]:
        """Works the indices out anew if enough has happened since."""
        num, shorter = self.num_met, self.shorter
        if shorter is not None:
            if self.num_reached[1] < MIN_COUNT:
                yield from shorter.refresh()
                return
            num += shorter.num_met
        if num < self._due:
            return
        self._due = num + min(_REFRESH * num, _MAX_NEW)
        indices: dict[str, float] = {}
        for agent in self.num_seen if shorter is None else {**shorter.num_seen, **self.num_seen}:
            if len(indices) % _AGENTS_A_PIECE == 0:
                yield
            indices[agent] = self._index(agent)
        self._indices = indices

    def met(self) -> None:
        """A task has come to this point."""
        self.num_met += 1
        if self.num_reached[1] > _MAX_COUNT:
            self.num_reached[:] = [count / 2 for count in self.num_reached]
            for agent, seen in list(self.num_seen.items()):
                self.num_seen[agent] = {distance: count / 2 for distance, count in seen.items()}
                if sum(seen.values()) < 2.0:
                    del self.num_seen[agent]

    def _index(self, agent: str) -> float:
        nums, totals, other = self.num_seen.get(agent, _NOTHING), self.num_reached, self.shorter
        more, weight = (_NOTHING, 0.0) if other is None else (other.num_seen.get(agent, _NOTHING), BACK_OFF)
        best = gone = spent = 0.0
        last = 0
        for distance in sorted(nums.keys() | more.keys()):
            spent += (distance - last) * (1.0 - gone)
            last = distance
            num = nums.get(distance, 0.0)
            if other is not None and distance in more:
                num += weight * more[distance] / other.num_reached[distance]
            gone = min(1.0, gone + num / (totals[distance] + weight))
            best = max(best, gone / spent)
            if gone == 1.0:
                break
        return best


@dataclass(slots=True)
class Progress:
    """The calls of a task so far."""

    latest: deque[tuple[str, Context, Context]] = field(default_factory=lambda: deque(maxlen=MAX_DISTANCE))
    """The last calls, the newest first: the agent, and the contexts that it made, the longer one first."""

    num_calls: Counter[str] = field(default_factory=Counter)
    """By agent."""

    @property
    def indices(self) -> Mapping[str, float]:
        """What each agent's memory is worth now: see `Context.indices`."""
        return self.latest[0][1].indices if self.latest else NO_INDICES

    def refresh(self) -> Iterator[None]:
        """See `Context.refresh`."""
        if self.latest:
            yield from self.latest[0][1].refresh()


class Returns:
    """What was seen in all tasks: they are instances of one application. A call costs O(`MAX_DISTANCE`)."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[tuple[str, str, int], Context] = OrderedDict()

    def called(self, progress: Progress, agent: str) -> Iterator[None]:
        """An agent calls in a task."""
        is_first = True
        latest = progress.latest
        for distance, (before, longer, shorter) in enumerate(latest, start=1):
            if distance % _CALLS_A_PIECE == 0:
                yield
            longer.num_reached[distance] += 1.0
            shorter.num_reached[distance] += 1.0
            if is_first:
                longer.saw(agent, distance)
                shorter.saw(agent, distance)
                is_first = before != agent
        progress.num_calls[agent] += 1
        name = (agent, latest[0][0] if latest else "", min(progress.num_calls[agent], _MAX_CALLS))
        short = self._context((agent, "", 0), None)
        latest.appendleft((agent, self._context(name, short), short))

    def ended(self, progress: Progress) -> Iterator[None]:
        """A task is over: nobody calls at the distances that it has not reached."""
        for next_distance, (_, longer, shorter) in enumerate(progress.latest, start=1):
            if next_distance % (_CALLS_A_PIECE // 4) == 0:
                yield
            for distance in range(next_distance, MAX_DISTANCE + 1):
                longer.num_reached[distance] += 1.0
                shorter.num_reached[distance] += 1.0
        progress.latest.clear()

    def _context(self, name: tuple[str, str, int], shorter: Context | None) -> Context:
        context = self._contexts.get(name)
        if context is None:
            context = self._contexts[name] = Context(shorter)
            if len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        else:
            self._contexts.move_to_end(name)
        context.met()
        return context

"""New programs wait while the working sets of those that have begun fill the cache.

A program whose contexts do not fit the device beside those of the others is computed anew at each of its turns, and
takes the blocks of others that need them a moment later: beyond that point every further program slows all of them
down (thrashing). Denning's working set model (CACM 1968) says what to do: a program is let in only if what it is going
to use fits beside what the active ones use; here these are contexts, as agents read all of theirs at every turn.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from agentserve.core.agents.policy import Action, Admit, Policy, TurnEvent, TurnKind
from agentserve.core.agents.registry import AgentRegistry, Program, Session
from agentserve.core.events import HUMAN
from agentserve.core.queues import Rank, rank
from agentserve.core.request import Request

GROWTH = 1.5
"""As long as no program has ended: a context, on average over its turns, is so many times its first prompt."""
IDLE_SHARE = 1.5
"""Of the cache, for the reserved tokens while no call is open: to compute again is better than to do nothing."""
PATIENCE_NS = 30_000_000_000
"""Aging: as long as no program has ended, one is let in at the latest so long after the one before it."""
AWAY_NS = 30_000_000_000
"""A program that makes no call for so long, and for `AWAY_GAPS` times its tool's mean gap, is active no more."""
AWAY_GAPS = 4.0
_MAX_ENDED = 64


@dataclass(slots=True, eq=False)
class _Active:
    """A program that was let in."""

    program: Program
    since_ns: int
    reserved: int
    """Tokens that are kept for it."""
    num_turns: int = 0
    context_sum: int = 0
    """Tokens of its contexts, summed over its turns."""
    contexts: dict[Session, int] = field(default_factory=dict)
    """Tokens of each session that no other program had in the cache before."""
    calls: set[str] = field(default_factory=set)
    """Open ones."""
    away_ns: int | None = None
    """When it is to be forgotten if it does not call."""

    @property
    def mean_context(self) -> int:
        """Over its turns."""
        return self.context_sum // self.num_turns if self.num_turns else 0


@dataclass(slots=True)
class _Waiting:
    """The calls of a program that has to wait."""

    ticket: int
    """Of its place in the heap: older ones are outdated."""
    requests: dict[str, Request] = field(default_factory=dict)

    @property
    def first(self) -> Request:
        return next(iter(self.requests.values()))


class WorkingSet(Policy):
    """Holds the calls of new programs back, in their order, while what is reserved for the active ones fills the cache.

    Kept for each is what programs use on average over their turns, by those that ended last, or what it uses on average
    itself if that is more: contexts grow, so that while some are near their end others are still short. While all of
    them wait for their tools, half as much again may be reserved. A program has ended when it says so, answers a
    person, or stays away. The next one is let in without room, too, when none was for as long as a program takes on
    average: so nothing starves.
    """

    name: ClassVar[str] = "working_set"

    def __init__(self, registry: AgentRegistry, capacity_tokens: int) -> None:
        self._registry = registry
        self._capacity = capacity_tokens
        self._active: dict[Program, _Active] = {}
        self._reserved = 0
        self._num_open = 0
        """Calls of active programs that have not ended."""
        self._held: dict[Program, _Waiting] = {}
        self._order: list[tuple[Rank, int, Program]] = []
        """A heap of the programs in `held`, by the rank of the first call and its ticket."""
        self._away: list[tuple[int, int, _Active]] = []
        self._contexts: deque[int] = deque(maxlen=_MAX_ENDED)
        """Of the programs that ended last, the mean over the turns of each."""
        self._durations_ns: deque[int] = deque(maxlen=_MAX_ENDED)
        self._shared_tokens = 0
        """What the program that was admitted last found in the cache at first."""
        self._last_entry_ns = 0
        self._has_changed = False
        """Whether there may be room that there was not when it was looked for last."""

    # ---- what happens ----

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        program = session.program
        if program in self._active:
            return False
        if not self._held and self._has_room(request):
            self._open(self._enter(program, request, now_ns), request.request_id)
            return False
        if program not in self._held:
            self._held[program] = _Waiting(request.sequence)
            heapq.heappush(self._order, (rank(request), request.sequence, program))
        self._held[program].requests[request.request_id] = request
        return True

    def observe(self, event: TurnEvent) -> None:
        session, request = event.session, event.request
        active = self._active.get(session.program)
        if active is None:
            if event.kind is TurnKind.FINISHED:
                self._drop(session.program, request.request_id)
        elif event.kind is TurnKind.SUBMITTED:
            self._open(active, request.request_id)
            active.away_ns = None
        elif event.kind is TurnKind.ADMITTED:
            if session.program.num_turns == 0:
                self._shared_tokens = session.shared_tokens or 0
        elif event.kind is TurnKind.FINISHED:
            self._close(active, request.request_id)
            if request.first_scheduled_ns is not None:
                self._count(active, session)
            if not active.calls and session.is_last_turn:
                self._end(active, event.at_ns)
            elif not active.calls:
                self._watch(active, session, event.at_ns)

    def tool_called(self, session: Session, now_ns: int) -> None:
        active = self._active.get(session.program)
        if active is None or active.calls:
            return
        if session.tool_name == HUMAN:
            self._end(active, now_ns)
        else:
            self._watch(active, session, now_ns)

    def act(self, now_ns: int) -> Iterable[Action]:
        while self._away and self._away[0][0] <= now_ns:
            due_ns, _, active = heapq.heappop(self._away)
            if active.away_ns == due_ns and self._active.get(active.program) is active:
                self._leave(active)
        if not self._held or not (self._has_changed or self._due_ns() <= now_ns):
            return ()
        actions: list[Action] = []
        while self._held:
            program = self._next()
            first = self._held[program].first
            if not self._has_room(first) and now_ns < self._due_ns():
                break
            active = self._enter(program, first, now_ns)
            for request_id in self._held.pop(program).requests:
                self._open(active, request_id)
                actions.append(Admit(request_id))
        self._has_changed = False
        return actions

    def next_deadline_ns(self) -> int | None:
        if not self._held:
            return None
        return min(self._due_ns(), self._away[0][0]) if self._away else self._due_ns()

    # ---- who waits ----

    def _next(self) -> Program:
        """The program that is let in next; there is one."""
        while True:
            _, ticket, program = self._order[0]
            waiting = self._held.get(program)
            if waiting is not None and waiting.ticket == ticket:
                return program
            heapq.heappop(self._order)

    def _due_ns(self) -> int:
        """When the next program is let in although there is no room."""
        first = self._held[self._next()].first
        patience_ns = PATIENCE_NS
        if self._durations_ns:
            patience_ns = sum(self._durations_ns) // len(self._durations_ns)
        return max(self._last_entry_ns, first.arrival_ns) + patience_ns

    def _drop(self, program: Program, request_id: str) -> None:
        """A call has ended that was held, as nobody waits for it any more."""
        waiting = self._held.get(program)
        if waiting is None or waiting.requests.pop(request_id, None) is None or waiting.requests:
            return
        del self._held[program]
        self._has_changed = True

    # ---- who is active ----

    def _open(self, active: _Active, request_id: str) -> None:
        active.calls.add(request_id)
        self._num_open += 1

    def _close(self, active: _Active, request_id: str) -> None:
        active.calls.remove(request_id)
        self._num_open -= 1
        self._has_changed |= self._num_open == 0

    def _has_room(self, request: Request) -> bool:
        limit = self._capacity if self._num_open else IDLE_SHARE * self._capacity
        return not self._active or self._reserved + self._expected(request) <= limit

    def _expected(self, request: Request) -> int:
        """Tokens that a program will use that begins with this call."""
        num_own = max(0, len(request.token_ids) - self._shared_tokens)
        if not self._contexts:
            return int(GROWTH * num_own)
        return max(num_own, sum(self._contexts) // len(self._contexts))

    def _enter(self, program: Program, request: Request, now_ns: int) -> _Active:
        active = self._active[program] = _Active(program, now_ns, self._expected(request))
        self._reserved += active.reserved
        self._last_entry_ns = now_ns
        return active

    def _count(self, active: _Active, session: Session) -> None:
        """Books a turn."""
        active.contexts[session] = max(0, session.context_tokens - (session.shared_tokens or 0))
        active.context_sum += sum(active.contexts.values())
        active.num_turns += 1
        reserved = max(active.reserved, active.mean_context)
        self._reserved += reserved - active.reserved
        active.reserved = reserved

    def _watch(self, active: _Active, session: Session, now_ns: int) -> None:
        """A program waits for a tool: it may never come back."""
        gaps = self._registry.gaps.of(session.tool_name, 1)
        wait_ns = AWAY_NS if gaps is None else max(AWAY_NS, int(AWAY_GAPS * gaps.mean_ns))
        active.away_ns = now_ns + wait_ns
        heapq.heappush(self._away, (active.away_ns, active.program.sequence, active))

    def _end(self, active: _Active, now_ns: int) -> None:
        self._contexts.append(active.mean_context)
        self._durations_ns.append(now_ns - active.since_ns)
        self._leave(active)

    def _leave(self, active: _Active) -> None:
        del self._active[active.program]
        self._reserved -= active.reserved
        self._has_changed = True

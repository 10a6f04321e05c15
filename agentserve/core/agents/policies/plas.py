"""Autellix (arXiv 2502.13965): the program that has been served least goes first."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import heapq
from collections.abc import Iterable, MutableMapping
from typing import ClassVar
from weakref import WeakKeyDictionary

from agentserve.core.agents.policy import Action, Policy, Reprioritize, TurnEvent, TurnKind
from agentserve.core.agents.registry import Program, Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request

MAX_WAITING_RATIO = 4.0
"""A program that has waited this many times as long as it was served goes to the front, and starts anew."""
_NEVER = (0, 0)
_SUBMITTED, _PREEMPTED = TurnKind.SUBMITTED, TurnKind.PREEMPTED


class Plas(Policy):
    """Program-level attained service: a call comes before those of programs that have run for longer.

    Service is counted anew whenever a program was moved to the front, because it had waited for `MAX_WAITING_RATIO`
    times its service: so nothing starves (section 4.2 of the paper; the paper's queues of discrete levels are left
    out, the order within them is the only difference).
    """

    name: ClassVar[str] = "plas"

    def __init__(self) -> None:
        self._offsets: MutableMapping[Program, tuple[int, int]] = WeakKeyDictionary()
        """What programs had when they were moved to the front."""
        self._has_moved = False
        """Whether one ever was."""
        self._due: list[tuple[int, int, str]] = []
        self._waiting: dict[str, tuple[int, Program]] = {}

    def observe(self, event: TurnEvent) -> None:
        kind, request_id = event.kind, event.request.request_id
        if kind is _SUBMITTED or kind is _PREEMPTED:
            program = event.session.program
            attained_ns, patience_ns = self._state(program)
            if attained_ns > 0:
                due_ns = event.at_ns + max(0, patience_ns)
                self._waiting[request_id] = (due_ns, program)
                heapq.heappush(self._due, (due_ns, event.request.sequence, request_id))
            return
        self._waiting.pop(request_id, None)

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        attained_ns, patience_ns = self._state(session.program)
        if attained_ns > 0 and patience_ns <= 0:
            self._move_to_front(session.program)
            return (0,)
        return (attained_ns,)

    def act(self, now_ns: int) -> Iterable[Action]:
        actions = []
        while self._due and self._due[0][0] <= now_ns:
            due_ns, _, request_id = heapq.heappop(self._due)
            found = self._waiting.get(request_id)
            if found is None or found[0] != due_ns:
                continue
            del self._waiting[request_id]
            self._move_to_front(found[1])
            actions.append(Reprioritize(request_id, (0,)))
        return actions

    def next_deadline_ns(self) -> int | None:
        while self._due:
            due_ns, _, request_id = self._due[0]
            found = self._waiting.get(request_id)
            if found is not None and found[0] == due_ns:
                return due_ns
            heapq.heappop(self._due)
        return None

    def _move_to_front(self, program: Program) -> None:
        self._has_moved = True
        self._offsets[program] = (program.attained_ns, program.waited_ns)

    def _state(self, program: Program) -> tuple[int, int]:
        """The service of a program since it was moved to the front last, and for how long it waits until it is the next
        time: nanoseconds."""
        attained_ns, waited_ns = program.attained_ns, program.waited_ns
        if self._has_moved:
            before_attained_ns, before_waited_ns = self._offsets.get(program, _NEVER)
            attained_ns, waited_ns = attained_ns - before_attained_ns, waited_ns - before_waited_ns
        return attained_ns, int(MAX_WAITING_RATIO * attained_ns) - waited_ns

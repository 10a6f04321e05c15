"""InferCept (arXiv 2402.01869): while a tool runs, do with the KV what wastes the least memory over time."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policy import (
    Action,
    Demote,
    Forecast,
    Pin,
    Policy,
    TurnEvent,
    TurnKind,
    forecast_from_gaps,
)
from agentserve.core.agents.registry import MAX_SESSIONS, AgentRegistry, Session
from agentserve.core.memory.eviction import Key

_SUBMITTED, _ADMITTED, _FINISHED = TurnKind.SUBMITTED, TurnKind.ADMITTED, TurnKind.FINISHED


def preserve_waste(gap_ns: float, context_tokens: int) -> float:
    """Memory times time that nobody uses while a context is kept: token nanoseconds."""
    return gap_ns * context_tokens


def discard_waste(costs: ForwardCosts, context_tokens: int, running_tokens: int, num_running_in_batch: int) -> float:
    """The same while a context is computed again in chunks beside what runs: token nanoseconds.

    The room for chunks, h, is what the batch has left up to the knee. The chunks before the last one hold 1, 2, ... n
    chunks of memory for a whole step each, and make everybody else wait for h tokens; the last one makes them wait for
    what is left (section 4.2 of the paper, as its code computes it).
    """
    room = max(costs.knee_tokens - num_running_in_batch, 1)
    num_full = max(0, math.ceil(context_tokens / room) - 1)
    step_ns = costs.base_ns + costs.token_ns * costs.knee_tokens
    chunk_ns, last_ns = costs.token_ns * room, costs.token_ns * (context_tokens - num_full * room)
    own = step_ns * (1 + num_full) * num_full / 2 * room
    return own + (chunk_ns * num_full + last_ns) * running_tokens


class MinWaste(Policy):
    """Preserves the private blocks of a session until its tool should be back, swaps them out, or gives them up.

    The gap of a tool is the mean of its measured gaps. Given up means that these blocks are evicted before anything
    else that is private, when room is needed: freeing them at once would win nothing.
    """

    name: ClassVar[str] = "min_waste"
    pins: ClassVar[bool] = True

    def __init__(
        self, registry: AgentRegistry, costs: ForwardCosts, swap_ns: Callable[[int], float] | None = None
    ) -> None:
        """`swap_ns`: time of the copies for so many tokens, there and back; None without a tier below the device."""
        self._registry = registry
        self._costs = costs
        self._swap_ns = swap_ns
        self._running: dict[str, int] = {}  # request: its tokens at its admission
        self._running_tokens = 0
        self._given_up: dict[str, None] = {}
        """By session, in order; as many as are remembered."""
        self._actions: list[Action] = []

    def observe(self, event: TurnEvent) -> None:
        kind, session, request_id = event.kind, event.session, event.request.request_id
        if kind is _ADMITTED:
            num_tokens = len(event.request.token_ids)
            self._running[request_id] = num_tokens
            self._running_tokens += num_tokens
        elif kind is _SUBMITTED:
            self._given_up.pop(session.session_id, None)
        else:
            self._running_tokens -= self._running.pop(request_id, 0)
            if kind is _FINISHED and session.idle_since_ns is not None:
                self._decide(session, event.at_ns)

    def tool_called(self, session: Session, now_ns: int) -> None:
        self._given_up.pop(session.session_id, None)
        self._decide(session, now_ns)

    def _decide(self, session: Session, now_ns: int) -> None:
        forecast = self.predict(session, now_ns)
        if forecast is None:
            return
        gap_ns, context = forecast.next_use_ns - now_ns, session.context_tokens
        if session.pinned_until_ns is not None:
            self._actions.append(Pin(session, now_ns))  # as was decided before the tool was known
        if gap_ns < math.inf:
            discard = discard_waste(self._costs, context, self._running_tokens, len(self._running))
            # Copies run beside the computation, so all that they cost is the memory of what is on its way.
            swap = math.inf if self._swap_ns is None else self._swap_ns(context) * context
            preserve = preserve_waste(gap_ns, context)
            if preserve <= discard and preserve <= swap:
                self._actions.append(Pin(session, math.ceil(forecast.next_use_ns)))
                return
            if swap < discard:
                self._actions.append(Demote(session))
                return
        self._given_up[session.session_id] = None
        if len(self._given_up) > MAX_SESSIONS:
            del self._given_up[next(iter(self._given_up))]

    def score(self, session: Session, now_ns: int) -> Key:
        return (0 if session.session_id in self._given_up else 1, session.last_used_ns)

    def predict(self, session: Session, now_ns: int) -> Forecast | None:
        return forecast_from_gaps(self._registry, session, now_ns)

    def act(self, now_ns: int) -> Iterable[Action]:
        actions, self._actions = self._actions, []
        return actions

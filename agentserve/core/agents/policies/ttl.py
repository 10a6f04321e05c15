"""Continuum (arXiv 2511.02230): keep the KV of a session while its tool runs, but not too long."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policy import Action, Forecast, Pin, Policy, TurnEvent, TurnKind, forecast_from_gaps
from agentserve.core.agents.registry import AgentRegistry, GapSamples, Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request

MIN_SAMPLES = 8
"""Fewer gaps of a tool tell nothing: then those of all tools count, and `DEFAULT_TTL_NS` if they are too few as well.
The paper waits for 100, which a few local agents never reach."""
DEFAULT_TTL_NS = 2_000_000_000
"""What the released code pins for."""
_MAX_DELAYS = 100
_ADMITTED, _FINISHED = TurnKind.ADMITTED, TurnKind.FINISHED


class Memoryfulness:
    """How much the number of turns so far tells about those that are left: `-corr(k, N - k)` over ended programs.

    1 if all programs have the same number of turns; near 0 if the number so far tells nothing. From sums, so that a
    program with N turns costs O(1): it adds the points k = 1 .. N-1.
    """

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._xy = 0
        self.value = 1.0
        """Between 0 and 1; 1 as long as nothing is known."""

    def add(self, num_turns: int) -> None:
        """A program has ended after so many turns."""
        n = num_turns - 1
        if n < 1:
            return
        self._n += n
        sum_k, sum_kk = n * (n + 1) // 2, n * (n + 1) * (2 * n + 1) // 6
        # N - k runs through the same numbers as k, backwards: sums of both are the same.
        self._x += sum_k
        self._xx += sum_kk
        self._xy += num_turns * sum_k - sum_kk
        variance = self._n * self._xx - self._x * self._x
        if variance > 0:
            self.value = min(1.0, max(0.0, -(self._n * self._xy - self._x * self._x) / variance))


class Ttl(Policy):
    """Pins a session's private blocks when a turn ends, for the time that pays best for the tool that runs then.

    The benefit of being in time is a prefill less and, since a session without its blocks queues again, the average
    delay in the queue times the memoryfulness. The pins of sessions that came last yield first.
    """

    name: ClassVar[str] = "ttl"
    pins: ClassVar[bool] = True

    def __init__(self, registry: AgentRegistry, costs: ForwardCosts) -> None:
        self._registry = registry
        self._costs = costs
        self._delays: deque[int] = deque()
        self._delay_sum_ns = 0
        self._memoryfulness = Memoryfulness()
        self._idle: dict[Session, None] = {}
        """Sessions whose time to live is to be set before anything is admitted, in order."""
        self._stale: GapSamples | None = None
        """Of which the times to live are to be worked out anew, in steps of their own."""

    def observe(self, event: TurnEvent) -> None:
        kind, session = event.kind, event.session
        if kind is _ADMITTED:
            self._delays.append(event.lasted_ns)
            self._delay_sum_ns += event.lasted_ns
            if len(self._delays) > _MAX_DELAYS:
                self._delay_sum_ns -= self._delays.popleft()
        elif kind is _FINISHED and session.idle_since_ns is not None:
            if session.is_last_turn:
                self._memoryfulness.add(session.program.num_turns)
            else:
                self._idle[session] = None

    def tool_called(self, session: Session, now_ns: int) -> None:
        if not session.is_last_turn:
            self._idle[session] = None

    def ttl_ns(self, session: Session) -> int:
        """For how long the blocks of a session whose turn has ended are worth keeping."""
        gaps = self._registry.gaps.of(session.tool_name, MIN_SAMPLES)
        if gaps is None:
            return DEFAULT_TTL_NS
        delay_ns = self._delay_sum_ns / len(self._delays) if self._delays else 0.0
        reload_ns = self._costs.prefill_ns(session.context_tokens)
        # Whoever keeps blocks for so long pays that time of memory, and has the benefit if the tool is back by then
        # (section 4 of the paper).
        best_ns = gaps.best_wait_ns(delay_ns * self._memoryfulness.value + reload_ns)
        if gaps.is_stale:
            self._stale = gaps
        return best_ns

    def score(self, session: Session, now_ns: int) -> Key:
        if session.pinned_until_ns is not None and now_ns < session.pinned_until_ns:
            return (-session.program.sequence,)
        return (session.last_used_ns,)

    def predict(self, session: Session, now_ns: int) -> Forecast | None:
        return forecast_from_gaps(self._registry, session, now_ns)

    @property
    def is_behind(self) -> bool:
        return self._stale is not None

    def act(self, now_ns: int) -> Iterable[Action]:
        if self._idle:
            idle, self._idle = self._idle, {}
            # One may have called meanwhile, and a pin that was set before its tool was known may end now.
            return [
                Pin(session, session.idle_since_ns + self.ttl_ns(session))
                for session in idle
                if session.idle_since_ns is not None
            ]
        if self._stale is not None and self._stale.refresh_more():
            self._stale = None
        return ()


class Continuum(Ttl):
    """`Ttl`, and programs in the order of their arrival, those first whose blocks are still pinned."""

    name: ClassVar[str] = "continuum"

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        return (0 if session.is_pinned(now_ns) else 1, session.program.sequence)

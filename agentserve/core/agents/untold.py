"""What happens to calls, on its way to the policies: a bounded part of it in each step of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from agentserve.core.agents.isolation import Isolation
from agentserve.core.agents.policy import Policy, TurnEvent, TurnKind
from agentserve.core.agents.retention import RetentionSeat

MAX_EVENTS = 1
"""Of calls that were admitted, preempted or have ended, of which the policies are told in one step of the engine. The
others follow at once, in steps of their own, unless somebody asks before."""
_FINISHED = TurnKind.FINISHED


class UntoldEvents:
    """Events that the policies have not observed yet, in order."""

    def __init__(self, isolation: Isolation, retention: RetentionSeat) -> None:
        self._isolation = isolation
        self._retention = retention
        self._observers: Sequence[tuple[Policy, Callable[[TurnEvent], None]]] = ()
        self._events: deque[TurnEvent] = deque()
        self._num_left = MAX_EVENTS
        """Events that they may still be told of in this step."""
        self.has_listeners = False
        """Whether anybody wants events."""

    def __bool__(self) -> bool:
        return bool(self._events)

    def seat(self, observers: Sequence[tuple[Policy, Callable[[TurnEvent], None]]]) -> None:
        """Who is told from now on, besides the retention seat."""
        self._observers = observers
        self.has_listeners = bool(observers) or self._retention.rates_sessions

    def add(self, event: TurnEvent) -> None:
        """Something has happened; it is told at once if that is possible in this step.

        What a pin costs is more than a step has besides the end of a turn. So for a policy that pins, all ends are told
        in steps of their own, and until then what the turns have left is held.
        """
        self._events.append(event)
        if event.kind is _FINISHED and self._retention.hold(event.session, event.at_ns):
            self._num_left = 0
        elif self._num_left > 0:
            self._tell(self._num_left)

    def tell_all(self) -> None:
        """Somebody is about to ask."""
        if self._events:
            self._tell(len(self._events))

    def tell_more(self) -> None:
        """The policies are about to act: as much as is possible in this step. What happens after that has to wait."""
        if self._events and self._num_left > 0:
            self._tell(self._num_left)
        self._num_left = 0

    def end_step(self) -> None:
        """A step of the engine is over."""
        self._num_left = MAX_EVENTS

    def _tell(self, max_events: int) -> None:
        events, retention = self._events, self._retention
        while events and max_events > 0:
            max_events -= 1
            self._num_left -= 1
            event = events.popleft()
            if event.kind is _FINISHED:
                retention.hold_no_more(event.session)
            for policy, observe in self._observers:
                try:
                    observe(event)
                except Exception as error:  # noqa: BLE001  # see `Isolation.ask`: a call less for each event
                    self._isolation.raised(policy, error, None)
            retention.rescore(event.session)

"""When pins end."""

from __future__ import annotations

import heapq

from agentserve.core.agents.registry import Session


class PinTimers:
    """A timer for each pin. One that was replaced, or whose session is pinned no more, is passed over."""

    def __init__(self) -> None:
        self._timers: list[tuple[int, int, Session]] = []
        self._num_pins = 0

    def start(self, session: Session, until_ns: int) -> None:
        """Pins a session until a time, in place of any other one."""
        self._num_pins += 1
        session.pin_id = self._num_pins
        session.pinned_until_ns = until_ns
        heapq.heappush(self._timers, (until_ns, session.pin_id, session))

    def next_ns(self) -> int | None:
        """When the next pin ends."""
        while self._timers:
            until_ns, pin_id, session = self._timers[0]
            if session.pin_id == pin_id and session.pinned_until_ns == until_ns:
                return until_ns
            heapq.heappop(self._timers)
        return None

    def pop_expired(self, now_ns: int) -> list[Session]:
        """Sessions whose pins have ended, in this order."""
        expired, timers = [], self._timers
        while timers and timers[0][0] <= now_ns:
            until_ns, pin_id, session = heapq.heappop(timers)
            if session.pin_id == pin_id and session.pinned_until_ns == until_ns:
                expired.append(session)
        return expired

"""Calls that have not ended, and the time that they wait and run."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.core.agents.registry import Session
from agentserve.core.request import Request


@dataclass(slots=True)
class OpenCall:
    """A request that has not ended."""

    request: Request
    session: Session
    since_ns: int
    """Since when it waits or runs."""
    is_running: bool = False

    def leave(self, now_ns: int) -> int:
        """Books that it does not wait or run any more; returns for how long it did."""
        lasted_ns, session = now_ns - self.since_ns, self.session
        if self.is_running:
            session.num_running -= 1
            session.program.attained_ns += lasted_ns
        else:
            session.num_waiting -= 1
            session.program.waited_ns += lasted_ns
        return lasted_ns

    def move(self, now_ns: int, *, is_admitted: bool) -> int:
        """Books that it runs now, or waits again; returns for how long it has waited or run."""
        lasted_ns, session = self.leave(now_ns), self.session
        self.since_ns = now_ns
        self.is_running = is_admitted
        if not is_admitted:
            session.num_waiting += 1
            return lasted_ns
        session.num_running += 1
        if session.shared_tokens is None:
            session.shared_tokens = self.request.num_cached_tokens
        return lasted_ns

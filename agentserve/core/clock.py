"""Time as an input."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Anything that tells the time as nanoseconds since an arbitrary start; never goes backwards."""

    def now_ns(self) -> int: ...


class VirtualClock:
    """A clock that moves only when it is told to."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_to(self, now_ns: int) -> None:
        """Moves to `now_ns`. Raises ValueError when that lies in the past."""
        if now_ns < self._now_ns:
            raise ValueError(f"time would go backwards: {now_ns} < {self._now_ns}")
        self._now_ns = now_ns

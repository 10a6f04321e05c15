"""Which engine instance gets a call: round robin, least loaded, session affinity.

A router stands in front of the engines and knows what such a proxy knows: what it has sent where and what has come
back. It does not look into queues or caches. Nothing is drawn at random and ties go to the lowest number, so the same
calls in the same order are always placed alike.

Session affinity follows AgentServeSim (section 3, Session-Aware Router) and SAGA: a program stays where its KV is, with
a fallback when that instance has too much to do.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agentserve.errors import ConfigError

ROUTERS = ("round_robin", "least_loaded", "session_affinity")
OVERLOADS = ("wait", "re-prefill", "move")


class Reason(StrEnum):
    """Why a call went where it went."""

    ROTATION = "rotation"
    LEAST_LOADED = "least_loaded"
    NEW_SESSION = "new_session"
    """Affinity, the first call of a session: to the least loaded instance, its home from now on."""
    HOME = "home"
    WAIT = "wait"
    """Home, although that is overloaded."""
    RE_PREFILL = "re_prefill"
    """Away from an overloaded home, where everything is computed again; that is its home now."""
    MOVE = "move"
    """Away from an overloaded home, and the cached KV is copied there first; that is its home now."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a call goes."""

    instance: int
    reason: Reason
    source: int | None = None
    """The instance whose cached KV is copied before the call is delivered; None: nothing is copied."""


class Loads:
    """What is in flight at each instance: calls that were sent there and have not ended.

    An instance is less loaded than another if it has fewer calls in flight, or as many with fewer prompt tokens in
    all, or the lower number. Changes and queries take O(log n) for n instances, amortized.
    """

    def __init__(self, num_instances: int) -> None:
        self._calls = [0] * num_instances
        self._tokens = [0] * num_instances
        # Entries are not removed when they are outdated: `least_loaded` throws away those that it meets.
        self._heap = [(0, 0, instance) for instance in range(num_instances)]

    def __len__(self) -> int:
        return len(self._calls)

    def num_calls(self, instance: int) -> int:
        """Calls in flight there."""
        return self._calls[instance]

    def sent(self, instance: int, num_prompt_tokens: int) -> None:
        self._change(instance, 1, num_prompt_tokens)

    def ended(self, instance: int, num_prompt_tokens: int) -> None:
        self._change(instance, -1, -num_prompt_tokens)

    def least_loaded(self) -> int:
        """The instance with the least in flight."""
        while (top := self._heap[0]) != self._entry(top[2]):
            heapq.heappop(self._heap)
        return top[2]

    def _change(self, instance: int, num_calls: int, num_tokens: int) -> None:
        self._calls[instance] += num_calls
        self._tokens[instance] += num_tokens
        heapq.heappush(self._heap, self._entry(instance))
        if len(self._heap) > 64 + 4 * len(self._calls):
            self._heap = [self._entry(each) for each in range(len(self._calls))]
            heapq.heapify(self._heap)

    def _entry(self, instance: int) -> tuple[int, int, int]:
        return self._calls[instance], self._tokens[instance], instance


class Router(Protocol):
    """A routing policy. One object belongs to one run: it may remember."""

    def route(self, session_id: str, loads: Loads) -> Placement:
        """Where the next call of a session goes. Called once for each call, in the order in which they are sent."""
        ...


class RoundRobin:
    """One instance after the other, call by call."""

    def __init__(self) -> None:
        self._next = 0

    def route(self, session_id: str, loads: Loads) -> Placement:
        del session_id
        instance = self._next
        self._next = (instance + 1) % len(loads)
        return Placement(instance, Reason.ROTATION)


class LeastLoaded:
    """The instance with the least in flight, as `Loads` defines it, call by call."""

    def route(self, session_id: str, loads: Loads) -> Placement:
        del session_id
        return Placement(loads.least_loaded(), Reason.LEAST_LOADED)


class SessionAffinity:
    """Each session at its home: the instance where its last call ran.

    The home is overloaded when it has `overload_calls` calls in flight or more while another instance has fewer than
    that. Then `wait` sends the call home all the same, `re-prefill` and `move` make the least loaded instance its home.
    """

    def __init__(self, overload: str, overload_calls: int) -> None:
        """Raises ConfigError for an unknown way to handle overload and for a limit below 1."""
        if overload not in OVERLOADS:
            raise ConfigError(f"overload must be one of {', '.join(OVERLOADS)}, not {overload!r}")
        if overload_calls < 1:
            raise ConfigError(f"overload_calls must be at least 1, not {overload_calls}")
        self._overload = overload
        self._limit = overload_calls
        self._homes: dict[str, int] = {}

    def route(self, session_id: str, loads: Loads) -> Placement:
        home = self._homes.get(session_id)
        least = loads.least_loaded()
        if home is None:
            placement = Placement(least, Reason.NEW_SESSION)
        elif loads.num_calls(home) < self._limit or loads.num_calls(least) >= self._limit:
            placement = Placement(home, Reason.HOME)
        elif self._overload == "wait":
            placement = Placement(home, Reason.WAIT)
        elif self._overload == "move":
            placement = Placement(least, Reason.MOVE, source=home)
        else:
            placement = Placement(least, Reason.RE_PREFILL)
        self._homes[session_id] = placement.instance
        return placement


def build_router(name: str, *, overload: str, overload_calls: int) -> Router:
    """The policy of that name; `overload` and `overload_calls` are for `session_affinity` and not used by others.

    Raises ConfigError for names that there are not.
    """
    if name == "session_affinity":
        return SessionAffinity(overload, overload_calls)
    if name not in ROUTERS:
        raise ConfigError(f"router must be one of {', '.join(ROUTERS)}, not {name!r}")
    return RoundRobin() if name == "round_robin" else LeastLoaded()

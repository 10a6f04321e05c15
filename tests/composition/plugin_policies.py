"""Policies as somebody else may write them; `test_plugins` loads them by name."""

from __future__ import annotations

from agentserve.core.agents import Policy
from agentserve.core.agents.factory import PolicyContext
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key


class MostTurnsStay(Policy):
    """What a session is worth is how many calls it has made. `--policy my_package.policies:MostTurnsStay`."""

    def score(self, session: Session, now_ns: int) -> Key:
        return (session.num_turns, session.last_used_ns)


class NeedsContext(Policy):
    """One that wants to know what it is made with."""

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    @classmethod
    def from_context(cls, context: PolicyContext) -> NeedsContext:
        return cls(context)


class Raising(Policy):
    def score(self, session: Session, now_ns: int) -> Key:
        raise RuntimeError("out of ideas")


class CannotBeMade(Policy):
    def __init__(self) -> None:
        raise OSError("no such file")


NOT_A_POLICY = 3

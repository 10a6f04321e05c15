"""Policies as somebody else may write them; `test_plugins` loads them by name."""

from __future__ import annotations

from collections.abc import Iterable

from agentserve.core.agents import Policy
from agentserve.core.agents.factory import PolicyContext
from agentserve.core.agents.policy import Action, Admit, ToolUse, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request


class MostTurnsStay(Policy):
    """What a session is worth is how many calls it has made. `--policy my_package.policies:MostTurnsStay`."""

    def score(self, session: Session, now_ns: int) -> Key:
        return (session.num_turns, session.last_used_ns)


class OneProgram(Policy):
    """Sits in two seats: lets one session in at a time, and lets no tool out that writes."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.waiting: list[tuple[Session, str]] = []

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        self.session = self.session or session
        if session is not self.session:
            self.waiting.append((session, request.request_id))
        return session is not self.session

    def observe(self, event: TurnEvent) -> None:
        if event.kind is TurnKind.FINISHED and event.session.is_last_turn:
            self.session = None

    def act(self, now_ns: int) -> Iterable[Action]:
        if self.session is None and self.waiting:
            self.session, request_id = self.waiting.pop(0)
            yield Admit(request_id)

    def refusal(self, use: ToolUse) -> str | None:
        return "nothing is written here" if use.tool_name.startswith("write") else None


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

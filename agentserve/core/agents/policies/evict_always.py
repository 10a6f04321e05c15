"""No memory between turns: what a session needs is computed again. The lower bound of retention."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from agentserve.core.agents.policy import Action, Drop, Policy, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session


class EvictAlways(Policy):
    """Drops the private blocks of a session when its turn ends (`evict-always` in AgentServeSim)."""

    name: ClassVar[str] = "evict_always"

    def __init__(self) -> None:
        self._ended: dict[str, Session] = {}

    def observe(self, event: TurnEvent) -> None:
        if event.kind is TurnKind.FINISHED and event.session.is_idle:
            self._ended[event.session.session_id] = event.session
        elif event.kind is TurnKind.SUBMITTED:
            self._ended.pop(event.session.session_id, None)

    def act(self, now_ns: int) -> Iterable[Action]:
        actions = [Drop(session) for session in self._ended.values()]
        self._ended.clear()
        return actions

"""No memory between turns: what a session needs is computed again. The lower bound of retention."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from agentserve.core.agents.policy import Action, Drop, Policy, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key

MAX_BLOCKS = 4
"""That are freed in one step of the engine."""


class EvictAlways(Policy):
    """Drops the private blocks of a session when its turn ends (`evict-always` in AgentServeSim).

    A few in each step from the next one on, which is due at once; whoever needs room before that takes them first.
    """

    name: ClassVar[str] = "evict_always"

    def __init__(self) -> None:
        self._ended: dict[Session, bool] = {}
        """Sessions that have blocks to drop, and whether that has begun."""
        self._has_news = False
        """Whether a turn has ended since `act` was called."""

    def observe(self, event: TurnEvent) -> None:
        if event.kind is TurnKind.FINISHED and event.session.idle_since_ns is not None:
            self._ended[event.session] = False
            self._has_news = True
        elif event.kind is TurnKind.SUBMITTED:
            self._ended.pop(event.session, None)

    def score(self, session: Session, now_ns: int) -> Key:
        return (-1,) if session in self._ended else (session.last_used_ns,)

    @property
    def is_behind(self) -> bool:
        return bool(self._ended)

    def act(self, now_ns: int) -> Iterable[Action]:
        if self._has_news:
            self._has_news = False
            return ()
        for session, has_begun in list(self._ended.items()):
            group = session.blocks.group
            if group.num_cached <= MAX_BLOCKS or (has_begun and not group.num_live):
                del self._ended[session]  # this is the last of it
            else:
                self._ended[session] = True
            return (Drop(session, MAX_BLOCKS),)
        return ()

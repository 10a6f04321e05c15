"""ScaleSim (arXiv 2601.21473): the application says who is next, so keep and load memory by that."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import ClassVar

from agentserve.core.agents.distances import DistanceBook
from agentserve.core.agents.policy import Action, PlaceAdapter, Policy, Prefetch, Rescore, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session
from agentserve.core.events import SetDistances
from agentserve.core.memory.eviction import Key


class InvocationDistance(Policy):
    """The largest distance goes first, calls that are open never; what several agents use has their smallest distance.

    An agent below the threshold whose blocks are in a lower tier is loaded, into free memory or in place of agents that
    are farther away (section 4.3 of the paper). The same for its LoRA adapter. Agents without a distance go before all
    others, and among themselves those used longest ago.
    """

    name: ClassVar[str] = "invocation_distance"
    rates_by_users: ClassVar[bool] = True

    def __init__(self, threshold: float) -> None:
        """`threshold`: distances below it are near enough to load; 0: nothing is loaded before a call needs it."""
        self.book = DistanceBook()
        self._threshold = threshold
        self._crossing: list[tuple[float, str]] = []
        """A heap of the positions of agents that were too far to load when they were told."""
        self._actions: list[Action] = []
        self._users: dict[str, list[tuple[float, str]]] = {}
        """Adapter: a heap of positions of agents that use it."""

    # ---- what happens ----

    def set_distances(self, command: SetDistances, now_ns: int) -> None:
        for agent, distance in command.agents:
            if self.book.set(agent, distance, relative=command.relative):
                self._changed(agent)

    def observe(self, event: TurnEvent) -> None:
        session, agent = event.session, agent_of(event.session)
        if event.kind is TurnKind.SUBMITTED:
            self.book.began(agent, session)
            self._rate_adapter(session)
        elif event.kind is TurnKind.FINISHED:
            self.book.ended(agent, session.next_distance)
            self._changed(agent)

    def _changed(self, agent: str) -> None:
        """An agent is somewhere else; what its open calls need is held anyway."""
        position = self.book.position(agent)
        for session in self.book.sessions_of(agent):
            if session.is_idle:
                self._actions.append(Rescore(session))
                self._rate_adapter(session)
                if self._is_near(position):
                    self._actions.append(Prefetch(session, position))
        if not self._is_near(position) and math.isfinite(position):
            heapq.heappush(self._crossing, (position, agent))

    # ---- what follows from it ----

    def score(self, session: Session, now_ns: int) -> Key:
        if not session.is_idle:
            return (math.inf, session.last_used_ns)
        return (-self.book.position(agent_of(session)), session.last_used_ns)

    def wants_prefetch(self, session: Session) -> bool:
        return self._is_near(self.book.position(agent_of(session)))

    def act(self, now_ns: int) -> Iterable[Action]:
        # The point that has been reached may have moved: who was far is near now, at the same position.
        while self._crossing and self._is_near(self._crossing[0][0]):
            position, agent = heapq.heappop(self._crossing)
            if self.book.position(agent) == max(position, self.book.reached):
                self._changed(agent)
        if not self._actions:
            return ()
        actions, self._actions = self._actions, []
        return actions

    def _is_near(self, position: float) -> bool:
        return position - self.book.reached < self._threshold

    def _rate_adapter(self, session: Session) -> None:
        """An adapter is as near as the nearest of the agents that use it."""
        adapter, agent = session.adapter, agent_of(session)
        if adapter is None:
            return
        users = self._users.setdefault(adapter, [])
        position = self.book.position(agent)
        if math.isfinite(position):
            heapq.heappush(users, (position, agent))
        while users and self.book.position(users[0][1]) != max(users[0][0], self.book.reached):
            heapq.heappop(users)
        nearest = users[0][0] if users else math.inf
        self._actions.append(PlaceAdapter(adapter, nearest, self._is_near(nearest)))


def agent_of(session: Session) -> str:
    """The name by which distances are told: the agent's, else the session's."""
    return session.agent_id or session.session_id

"""Every agent gets the same share of the device while it wants it."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from agentserve.core.agents.policy import Policy, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request

_MAX_AGENTS = 4096


class FairShare(Policy):
    """Start-time fair queueing (Goyal et al. 1996) over agents, with the time that their calls run as the service.

    A call's place is where its agent's service stands, but not before the call that was admitted last: who was away has
    saved nothing up, and nobody starves.
    """

    name: ClassVar[str] = "fair_share"

    def __init__(self) -> None:
        self._service_ns: OrderedDict[str, int] = OrderedDict()
        self._now_serving_ns = 0
        self._places: dict[str, int] = {}

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        agent = _agent(session)
        place = max(self._service_ns.get(agent, 0), self._now_serving_ns)
        self._service_ns[agent] = self._places[request.request_id] = place
        self._service_ns.move_to_end(agent)
        if len(self._service_ns) > _MAX_AGENTS:
            self._service_ns.popitem(last=False)
        return (place,)

    def observe(self, event: TurnEvent) -> None:
        request_id = event.request.request_id
        if event.kind is TurnKind.ADMITTED:
            self._now_serving_ns = max(self._now_serving_ns, self._places.get(request_id, 0))
        elif event.kind in (TurnKind.FINISHED, TurnKind.PREEMPTED):
            agent = _agent(event.session)
            self._service_ns[agent] = self._service_ns.get(agent, 0) + event.lasted_ns
            if event.kind is TurnKind.FINISHED:
                self._places.pop(request_id, None)


def _agent(session: Session) -> str:
    return session.agent_id or session.session_id

"""`POST /agentserve/distances`: an application says how far its agents are from their next calls."""

from __future__ import annotations

import math
from typing import Annotated

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from agentserve.errors import InvalidRequestError
from agentserve.server.body import read_json_object, validate
from agentserve.server.state import STATE

MAX_AGENTS = 16_384
"""In one request."""
_MAX_NAME = 256


class DistancesBody(BaseModel):
    """Invocation distances by agent (`X-Agent-Id`), or by session for agents without a name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    agents: Annotated[
        dict[str, float],
        Field(description="Steps, hops or seconds until the next call of each agent; 0 is at once."),
    ]
    relative: Annotated[bool, Field(description="The numbers are changes, such as -1 for a step nearer.")] = False


async def distances(request: web.Request) -> web.Response:
    """Takes the distances over; the answer says of how many agents.

    Raises InvalidRequestError for anything but finite numbers (from 0 on, unless they are relative), for names that are
    empty or too long, and if the policy of this server has no use for distances.
    """
    state = request.app[STATE]
    body = validate(DistancesBody, await read_json_object(request))
    if not state.options.uses_distances:
        raise InvalidRequestError(
            "This server does not use distances: it runs without --policy invocation_distance.", code="no_distances"
        )
    if len(body.agents) > MAX_AGENTS:
        raise InvalidRequestError(f"agents: at most {MAX_AGENTS} at once, not {len(body.agents)}", param="agents")
    for name, distance in body.agents.items():
        if not name.strip() or len(name) > _MAX_NAME:
            raise InvalidRequestError(
                f"agents: a name has 1 to {_MAX_NAME} characters, not {name[:64]!r}", param="agents"
            )
        if not math.isfinite(distance) or (distance < 0 and not body.relative):
            expected = "a finite number" if body.relative else "a finite number from 0 on"
            raise InvalidRequestError(f"agents: expected {expected} for {name[:64]!r}, not {distance}", param="agents")
    state.client.set_distances(body.agents, relative=body.relative)
    return web.json_response({"num_agents": len(body.agents)})

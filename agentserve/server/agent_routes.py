"""`/agentserve/...`: who is served here, and what the cache does for them."""

from __future__ import annotations

from aiohttp import web

from agentserve.errors import InvalidRequestError
from agentserve.server.errors import EndpointNotFoundError
from agentserve.server.state import STATE


async def sessions(request: web.Request) -> web.Response:
    return web.json_response({"sessions": request.app[STATE].generation.caching.ledger.sessions()})


async def agents(request: web.Request) -> web.Response:
    return web.json_response({"agents": request.app[STATE].generation.caching.ledger.agents()})


async def explain(request: web.Request) -> web.Response:
    """Raises InvalidRequestError without a request id, EndpointNotFoundError for one that is not known."""
    request_id = request.query.get("request")
    if not request_id:
        raise InvalidRequestError("request: the id of a request is needed (X-Request-Id)", param="request")
    explanation = request.app[STATE].generation.caching.ledger.explain(request_id)
    if explanation is None:
        raise EndpointNotFoundError(f"No request {request_id[:128]!r} is remembered, or it has not ended.")
    return web.json_response(explanation)

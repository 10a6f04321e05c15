"""`/agentserve/...`: who is served here, and what the cache does for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from agentserve.core.memory.answers import ReadTokens
from agentserve.errors import EngineError, InvalidRequestError
from agentserve.server.errors import EndpointNotFoundError
from agentserve.server.state import STATE, ServerState


async def sessions(request: web.Request) -> web.Response:
    """All sessions, or that of `?session=NAME`, and where the KV of each is; `kv` is null while the engine is down."""
    state = request.app[STATE]
    wanted = request.query.get("session")
    found = []
    for description, readings in state.generation.caching.ledger.sessions():
        if wanted in (None, description["session"]):
            # One question for each session, so that the engine works on between them.
            found.append({**description, "kv": await _where(state, readings)})
    return web.json_response({"sessions": found})


async def _where(state: ServerState, readings: Sequence[ReadTokens]) -> dict[str, Any] | None:
    try:
        located = await state.client.locate(readings)
    except EngineError:
        return None
    blocks, size = located.blocks, located.blocks.block_size
    return {
        "num_blocks": blocks.num_blocks,
        "num_tokens": blocks.num_blocks * size,
        "tiers": {
            tier.value: {"num_blocks": count, "num_tokens": count * size}
            for tier, count in blocks.num_tier_blocks.items()
        },
        "num_held_blocks": blocks.num_held_blocks,
        "num_pinned_blocks": blocks.num_pinned_blocks,
        "pinned_for_s": located.pinned_for_s,
    }


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

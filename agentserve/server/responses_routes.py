"""`/v1/responses` and `/v1/responses/input_tokens`."""

from __future__ import annotations

from aiohttp import web

from agentserve.server.answer import answer, count_tokens
from agentserve.server.responses_encode import ResponsesEncoder
from agentserve.server.responses_parse import parse_input_tokens_request, parse_responses_request


async def responses(request: web.Request) -> web.StreamResponse:
    return await answer(request, parse_responses_request, ResponsesEncoder, "resp_")


async def input_tokens(request: web.Request) -> web.Response:
    """Exact, and without any work of the engine."""
    num_tokens = await count_tokens(request, parse_input_tokens_request)
    return web.json_response({"object": "response.input_tokens", "input_tokens": num_tokens})

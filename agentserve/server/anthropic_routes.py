"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from aiohttp import web

from agentserve.server.answer import answer, count_tokens
from agentserve.server.anthropic_encode import MessagesEncoder
from agentserve.server.anthropic_parse import parse_count_request, parse_messages_request


async def messages(request: web.Request) -> web.StreamResponse:
    return await answer(request, parse_messages_request, MessagesEncoder, "msg_")


async def messages_count_tokens(request: web.Request) -> web.Response:
    """Exact, and without any work of the engine."""
    return web.json_response({"input_tokens": await count_tokens(request, parse_count_request)})

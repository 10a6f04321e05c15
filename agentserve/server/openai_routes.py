"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from aiohttp import web

from agentserve.server.answer import answer
from agentserve.server.openai_chat import ChatEncoder, parse_chat_request
from agentserve.server.openai_completions import CompletionEncoder, parse_completion_request


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await answer(request, parse_chat_request, ChatEncoder, "chatcmpl-")


async def completions(request: web.Request) -> web.StreamResponse:
    return await answer(request, parse_completion_request, CompletionEncoder, "cmpl-")

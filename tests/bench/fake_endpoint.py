"""A small OpenAI endpoint in this process. It counts words as tokens and can play a script with exact times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

FIRST_OVERHEAD, MESSAGE_OVERHEAD, TOKENS_PER_WORD = 4, 3, 2
"""What its chat template adds to a conversation and to each message, and how many tokens a word has."""
END = "[DONE]"


class ScriptClock:
    """A clock for the client whose time the server sets: a chunk has arrived exactly when the script says."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.was_read = asyncio.Event()

    def __call__(self) -> int:
        self.was_read.set()
        return self.now_ns


class Scripted:
    """One stream: pairs of a time and an event (a payload, `[DONE]`, or raw bytes)."""

    def __init__(self, clock: ScriptClock, events: Sequence[tuple[int, Mapping[str, Any] | str | bytes]]) -> None:
        self._clock = clock
        self._events = events

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for at_ns, event in self._events:
            # The next chunk is sent when the client has stamped this one, so no two of them are read together.
            self._clock.was_read.clear()
            self._clock.now_ns = at_ns
            await response.write(event if isinstance(event, bytes) else sse(event))
            await self._clock.was_read.wait()
        return response


def sse(event: Mapping[str, Any] | str) -> bytes:
    return f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()


def chunk(
    text: str, num_tokens: int | None = None, *, finish: str | None = None, num_prompt: int = 7
) -> dict[str, Any]:
    """A piece of an answer; with `num_tokens` it says how many there are so far."""
    payload: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    if num_tokens is not None:
        payload["usage"] = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
    return payload


def usage(num_prompt: int, num_output: int, num_cached: int | None = None) -> dict[str, Any]:
    counts: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
    if num_cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return {"choices": [], "usage": counts}


class FakeServer:
    """Answers every call with as many words as it may, at once; keeps what it was sent."""

    def __init__(self, gap_s: float = 0.0) -> None:
        """`gap_s` lies between two tokens."""
        self._gap_s = gap_s
        self.bodies: list[dict[str, Any]] = []
        self.sessions: list[str] = []
        self.num_running = 0
        self.max_running = 0
        self.base_url = ""
        self.answer: Callable[[dict[str, Any], web.StreamResponse], Awaitable[None]] = self.stream
        self.script: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "a/fake-model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self.script is not None:
            return await self.script(request)
        body = await request.json()
        self.bodies.append(body)
        self.sessions.append(request.headers["X-Session-ID"])
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self.answer(body, response)
            return response
        finally:
            self.num_running -= 1

    async def stream(self, body: dict[str, Any], response: web.StreamResponse) -> None:
        num_prompt, num_output = num_tokens(body["messages"]), body["max_tokens"]
        for index in range(1, num_output + 1):
            await response.write(sse(chunk(f"w{index} ", index, num_prompt=num_prompt)))
            await asyncio.sleep(self._gap_s)
        await response.write(sse(usage(num_prompt, num_output)) + sse(END))


def num_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    words = sum(len(message["content"].split()) for message in messages)
    return FIRST_OVERHEAD + MESSAGE_OVERHEAD * len(messages) + TOKENS_PER_WORD * words


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    """Listens on a free port."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield server
    finally:
        await runner.cleanup()

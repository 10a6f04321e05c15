"""Server-sent events: headers at once, comments while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from aiohttp import web

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_KEEP_ALIVE = b": keep-alive\n\n"


class SseWriter:
    """Writes one event stream. Entering the context sends the headers, leaving it stops the keep-alive.

    A comment is sent after each `ping_interval_s` of silence: clients and proxies give up on silent connections while
    a long prompt is being read, and a comment is invisible to every SSE parser.
    """

    def __init__(self, request: web.Request, *, ping_interval_s: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self._ping_interval_s = ping_interval_s
        self._last_write_s = 0.0
        self._is_writing = False
        self._pinger: asyncio.Task[None] | None = None

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    async def __aenter__(self) -> SseWriter:
        await self._response.prepare(self._request)
        self._last_write_s = asyncio.get_running_loop().time()
        self._pinger = asyncio.create_task(self._ping())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._pinger is not None
        self._pinger.cancel()
        await asyncio.gather(self._pinger, return_exceptions=True)

    async def send(self, data: Mapping[str, Any], *, event: str | None = None) -> None:
        """Sends one event. Waits while the client does not read. Raises ConnectionError when it is gone."""
        name = "" if event is None else f"event: {event}\n"
        await self._write(f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode())

    async def send_done(self) -> None:
        """Sends the end mark of the OpenAI dialects."""
        await self._write(b"data: [DONE]\n\n")

    async def _write(self, data: bytes) -> None:
        self._is_writing = True
        try:
            await self._response.write(data)
        finally:
            self._is_writing = False
            self._last_write_s = asyncio.get_running_loop().time()

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silence_s = loop.time() - self._last_write_s
            if silence_s < self._ping_interval_s:
                await asyncio.sleep(self._ping_interval_s - silence_s)
            elif self._is_writing:
                # The client has bytes left to read, so the connection is not silent to it.
                await asyncio.sleep(self._ping_interval_s)
            else:
                try:
                    await self._write(_KEEP_ALIVE)
                except ConnectionError:
                    return  # the handler is being cancelled

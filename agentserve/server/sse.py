"""Server-sent events: headers at once, comments while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from aiohttp import web

logger = logging.getLogger(__name__)
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_COMMENT = b": keep-alive\n\n"


async def write_within(request: web.Request, timeout_s: float, writing: Awaitable[None]) -> None:
    """Waits for `writing`, which waits while the client does not read.

    After `timeout_s` the connection is cut: nothing else ever ends for a client that is there and does not read. Raises
    ConnectionError when the client is gone, or cut off.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await writing
    except TimeoutError:
        logger.info("a client has read nothing for %.0f s and is cut off", timeout_s)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None


class SseWriter:
    """Writes one event stream. Entering the context sends the headers, leaving it stops the keep-alive.

    Something is sent after each `ping_interval_s` of silence: clients and proxies give up on silent connections while
    a long prompt is being read. A comment is invisible to every SSE parser; clients that measure the time between
    *events* need one.
    """

    def __init__(
        self,
        request: web.Request,
        *,
        ping_interval_s: float,
        write_timeout_s: float,
        names_events: bool = False,
        keep_alive: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """Args:
        request: to be answered.
        ping_interval_s: silence before something is sent.
        write_timeout_s: how long the client may leave everything unread.
        names_events: each event has the name in its `type`.
        keep_alive: the event to send after a silence, None: a comment.
        """
        self._write_timeout_s = write_timeout_s
        self._request = request
        self._names_events = names_events
        self._keep_alive = keep_alive
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

    async def send(self, data: Mapping[str, Any]) -> None:
        """Sends one event. Waits while the client does not read. Raises ConnectionError when it is gone, or cut off."""
        await self._write(self._frame(data))

    async def send_done(self) -> None:
        """Sends the end mark of the OpenAI dialects."""
        await self._write(b"data: [DONE]\n\n")

    async def end(self) -> None:
        """Ends the answer, once the client has read nearly all of it. Raises ConnectionError when it is gone."""
        await write_within(self._request, self._write_timeout_s, self._response.write_eof())

    def _frame(self, data: Mapping[str, Any]) -> bytes:
        name = f"event: {data['type']}\n" if self._names_events else ""
        return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    async def _write(self, data: bytes) -> None:
        self._is_writing = True
        try:
            await write_within(self._request, self._write_timeout_s, self._response.write(data))
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
                data = self._keep_alive()
                try:
                    await self._write(_COMMENT if data is None else self._frame(data))
                except ConnectionError:
                    return  # the handler is being cancelled

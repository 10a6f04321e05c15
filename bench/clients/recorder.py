"""A proxy on loopback that passes requests on to the daemon and keeps what went by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection", "keep-alive"}


@dataclass(slots=True)
class Exchange:
    """One request and its answer."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    body: bytes
    status: int = 0
    reply_headers: dict[str, str] = field(default_factory=dict)
    reply: bytes = b""


class Recorder:
    """Keeps exchanges in the order in which they began."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.exchanges: list[Exchange] = []
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=64 << 20)
        # Nothing is followed, decompressed or retried: the client must see what the daemon sends.
        async with aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)) as session:
            app.router.add_route("*", "/{path:.*}", lambda request: self._pass_on(request, session))
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield
            finally:
                await runner.cleanup()

    async def _pass_on(self, request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
        exchange = Exchange(request.method, request.path_qs, dict(request.headers), await request.read())
        self.exchanges.append(exchange)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with session.request(
            request.method, self._target + request.path_qs, headers=headers, data=exchange.body, allow_redirects=False
        ) as reply:
            exchange.status = reply.status
            exchange.reply_headers = dict(reply.headers)
            answer = web.StreamResponse(
                status=reply.status,
                headers={name: value for name, value in reply.headers.items() if name.lower() not in _HOP_BY_HOP},
            )
            await answer.prepare(request)
            async for chunk in reply.content.iter_any():
                exchange.reply += chunk
                # Some clients hang up as soon as they have seen the last event.
                with suppress(ConnectionResetError):
                    await answer.write(chunk)
            with suppress(ConnectionResetError):
                await answer.write_eof()
            return answer

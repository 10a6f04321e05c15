"""Puts the server together and runs it."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from agentserve.errors import ConfigError
from agentserve.server import (
    agent_routes,
    anthropic_routes,
    distances,
    info_routes,
    openai_routes,
    openapi,
    responses_routes,
    token_routes,
    tool_memo,
)
from agentserve.server.middleware import add_headers, guard, handle_errors
from agentserve.server.state import STATE, ServerOptions, ServerState

__all__ = ["ServerOptions", "ServerState", "create_app", "run_server"]

logger = logging.getLogger(__name__)
_ABORT_GRACE_S = 1.0
"""How long aborted requests may take to tell their clients."""


def create_app(state: ServerState) -> web.Application:
    """The application. Its runner must set `handler_cancellation`, or disconnects are not noticed in silence."""
    app = web.Application(middlewares=[handle_errors, guard], client_max_size=state.options.max_body_bytes)
    app[STATE] = state
    app.on_response_prepare.append(add_headers)
    router = app.router
    for prefix in ("/v1", ""):
        router.add_post(f"{prefix}/chat/completions", openai_routes.chat_completions)
        router.add_post(f"{prefix}/completions", openai_routes.completions)
        router.add_post(f"{prefix}/responses", responses_routes.responses)
        router.add_post(f"{prefix}/responses/input_tokens", responses_routes.input_tokens)
        router.add_post(f"{prefix}/messages", anthropic_routes.messages)
        router.add_post(f"{prefix}/messages/count_tokens", anthropic_routes.messages_count_tokens)
        router.add_get(f"{prefix}/models", info_routes.list_models)
        router.add_get(f"{prefix}/models/{{name:.+}}", info_routes.get_model)
    router.add_post("/tokenize", token_routes.tokenize)
    router.add_post("/detokenize", token_routes.detokenize)
    router.add_get("/props", token_routes.props)
    router.add_get("/agentserve/sessions", agent_routes.sessions)
    router.add_get("/agentserve/agents", agent_routes.agents)
    router.add_get("/agentserve/cache/explain", agent_routes.explain)
    router.add_post("/agentserve/distances", distances.distances)
    app[tool_memo.MEMO] = state.tool_memo
    router.add_put("/agentserve/tools/memo", tool_memo.put_memo)
    router.add_get("/agentserve/tools/memo", tool_memo.get_memo)
    router.add_get("/openapi.json", openapi.openapi)
    router.add_get("/", info_routes.root)
    router.add_get("/health", info_routes.health)
    router.add_get("/ready", info_routes.ready)
    router.add_get("/metrics", info_routes.metrics)
    return app


async def run_server(
    state: ServerState,
    *,
    on_ready: Callable[[str, int], None] | None = None,
    stop: asyncio.Event | None = None,
    abort: asyncio.Event | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then drains: running requests go on, new ones are refused with 503.

    A second signal, or the end of `drain_timeout_s`, aborts what still runs. The engine must outlive this call.

    Args:
        state: the parts.
        on_ready: called with host and port once connections are accepted; the port is the real one if it was 0.
        stop: set by the caller instead of a signal.
        abort: the same for the second signal.

    Raises ConfigError when the address cannot be used.
    """
    stop = stop or asyncio.Event()
    abort = abort or asyncio.Event()
    options = state.options
    runner = web.AppRunner(
        create_app(state),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=_ABORT_GRACE_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"cannot listen on {options.host} port {options.port}: {error}") from error
        with _signals(stop, abort):
            if on_ready is not None:
                on_ready(options.host, runner.addresses[0][1])
            await stop.wait()
            await _drain(state, site, abort)
    finally:
        await runner.cleanup()
        state.generation.close()


async def _drain(state: ServerState, site: web.TCPSite, abort: asyncio.Event) -> None:
    state.is_draining = True
    await site.stop()
    if state.num_active:
        logger.info("finishing %d running requests; a second signal aborts them", state.num_active)
    waits = [asyncio.create_task(state.idle.wait()), asyncio.create_task(abort.wait())]
    await asyncio.wait(waits, timeout=state.options.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    if state.num_active:
        logger.warning("aborting %d running requests", state.num_active)
        state.generation.abort_all()
        await asyncio.wait([asyncio.create_task(state.idle.wait())], timeout=_ABORT_GRACE_S)


@contextmanager
def _signals(stop: asyncio.Event, abort: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, every further one `abort`."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (abort if stop.is_set() else stop).set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)

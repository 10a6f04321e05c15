"""What is served here and how it is: models, health, readiness, metrics."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from agentserve import __version__
from agentserve.server.state import CLAUDE_PREFIXES, STATE, ServerState


async def root(request: web.Request) -> web.Response:
    """Some clients probe `/` before anything else."""
    return web.json_response({"name": "agentserve", "model": request.app[STATE].options.model_name})


async def health(request: web.Request) -> web.Response:
    """Liveness: answered by the event loop alone, whatever the engine does. Needs no key."""
    state = request.app[STATE]
    options = state.options
    failure = state.engine_failure()
    reply: dict[str, Any] = {
        "status": "ok" if failure is None else "error",
        "model": options.model_name,
        "executor": options.executor,
        "device": options.device,
        "dtype": options.dtype,
        "simulated": options.simulated,
        "note": "; ".join(options.notes) or None,
        "version": __version__,
    }
    if tiers := state.client.stats().tiers:
        reply["kv_tiers"] = [dataclasses.asdict(tier) for tier in tiers]
    if failure is not None:
        reply["error"] = {"code": 503, "message": failure, "type": "unavailable_error"}
    return web.json_response(reply, status=200 if failure is None else 503)


async def ready(request: web.Request) -> web.Response:
    """Whether a request sent now would be taken."""
    state = request.app[STATE]
    reason = state.engine_failure() or ("The server is shutting down." if state.is_draining else None)
    if reason is None:
        return web.json_response({"status": "ready"})
    error = {"code": 503, "message": reason, "type": "unavailable_error"}
    return web.json_response({"error": error}, status=503, headers={"Retry-After": "5"})


async def metrics(request: web.Request) -> web.Response:
    body = request.app[STATE].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def list_models(request: web.Request) -> web.Response:
    state = request.app[STATE]
    names = state.model_names
    if "anthropic-version" in request.headers and state.options.claude_alias:
        # A client of that dialect offers its user only models whose names start like this.
        names = tuple(name if name.startswith(CLAUDE_PREFIXES) else f"claude-{name}" for name in names)
    return web.json_response(
        {
            "object": "list",
            "data": [_describe(state, name) for name in names],
            "has_more": False,
            "first_id": names[0],
            "last_id": names[-1],
            # One agent reads its catalogue from here.
            "models": [
                {
                    "slug": name,
                    "display_name": name,
                    "context_window": state.client.max_model_len,
                    "input_modalities": ["text"],
                    "supports_parallel_tool_calls": True,
                }
                for name in names
            ],
        }
    )


async def get_model(request: web.Request) -> web.Response:
    """Raises ModelNotFoundError."""
    state = request.app[STATE]
    return web.json_response(_describe(state, state.resolve_model(request.match_info["name"])))


def _describe(state: ServerState, name: str) -> dict[str, Any]:
    """All windows are the one that requests get, not the one of the training: agents plan with it."""
    options = state.options
    window = state.client.max_model_len
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": options.created,
        "created_at": datetime.datetime.fromtimestamp(options.created, datetime.UTC).isoformat(),
        "owned_by": "agentserve",
        **({} if state.adapter_of(name) is None else {"parent": options.model_name}),
        "display_name": name,
        "max_model_len": window,
        "context_length": window,
        "context_window": window,
        "meta": {
            "n_ctx": window,
            "n_ctx_train": options.train_context,
            "n_params": options.num_parameters,
            "size": options.model_bytes,
        },
    }

"""The OpenAPI document of the HTTP surface: paths from one table, bodies from the models that check them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from agentserve import __version__
from agentserve.server.anthropic_schema import CountTokensBody, MessagesBody
from agentserve.server.distances import DistancesBody
from agentserve.server.openai_schema import ChatBody, CompletionBody
from agentserve.server.responses_schema import InputTokensBody, ResponsesBody
from agentserve.server.token_routes import DetokenizeBody, TokenizeBody
from agentserve.server.tool_memo import MemoBody

_REF = "#/components/schemas/{model}"
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class _Operation:
    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    streams: bool = False
    """Whether the answer may be a stream of events."""
    anthropic: bool = False
    """Whether errors have the shape of that dialect."""
    content_type: str = "application/json"
    required: tuple[str, ...] = ()
    """Fields that a JSON answer always has."""
    query: tuple[str, ...] = ()
    """Required texts in the query."""


_VERSIONED = (
    _Operation("post", "/chat/completions", "OpenAI chat completions", ChatBody, True, required=("id", "choices")),
    _Operation("post", "/completions", "OpenAI completions", CompletionBody, True, required=("id", "choices")),
    _Operation("post", "/responses", "OpenAI responses, without state", ResponsesBody, True, required=("id", "output")),
    _Operation(
        "post", "/responses/input_tokens", "Tokens of a response's input", InputTokensBody, required=("input_tokens",)
    ),
    _Operation(
        "post", "/messages", "Anthropic messages", MessagesBody, True, anthropic=True, required=("id", "content")
    ),
    _Operation(
        "post", "/messages/count_tokens", "Tokens of a message's input", CountTokensBody,
        anthropic=True, required=("input_tokens",),
    ),
    _Operation("get", "/models", "Models, with the window of a request", required=("data", "models")),
    _Operation("get", "/models/{name}", "One model", required=("id", "max_model_len")),
)  # fmt: skip
_OTHERS = (
    _Operation("post", "/tokenize", "Text or a conversation to token ids", TokenizeBody, required=("tokens", "count")),
    _Operation("post", "/detokenize", "Token ids to text", DetokenizeBody, required=("content",)),
    _Operation("get", "/props", "Properties, as llama.cpp's server has them"),
    _Operation("get", "/", "Name and model"),
    _Operation("get", "/health", "Liveness; needs no key", required=("status",)),
    _Operation("get", "/ready", "Whether a request would be taken now"),
    _Operation("get", "/metrics", "Prometheus metrics", content_type="text/plain"),
    _Operation(
        "get",
        "/agentserve/sessions",
        "Sessions, what the cache had of them, and where their KV is",
        required=("sessions",),
    ),
    _Operation("get", "/agentserve/agents", "Agents and what they asked for", required=("agents",)),
    _Operation(
        "get",
        "/agentserve/cache/explain",
        "Why a prompt was not found in the cache",
        required=("reason",),
        query=("request",),
    ),
    _Operation(
        "post",
        "/agentserve/distances",
        "How far agents are from their next calls",
        DistancesBody,
        required=("num_agents",),
    ),
    _Operation("put", "/agentserve/tools/memo", "Keep a tool's result", MemoBody, required=("num_entries",)),
    _Operation("get", "/agentserve/tools/memo", "A tool's result that was kept", required=("result",), query=("tool",)),
    _Operation("get", "/openapi.json", "This document", required=("openapi",)),
)


async def openapi(request: web.Request) -> web.Response:
    del request
    return web.json_response(document())


@cache
def document() -> dict[str, Any]:
    """The document; the same object every time, not to be changed."""
    operations = [(prefix, operation) for prefix in ("/v1", "") for operation in _VERSIONED] + [
        ("", operation) for operation in _OTHERS
    ]
    models = list(dict.fromkeys(operation.body for _, operation in operations if operation.body is not None))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    paths: dict[str, Any] = {}
    for prefix, operation in operations:
        paths.setdefault(prefix + operation.path, {})[operation.method] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentserve",
            "version": __version__,
            "description": "Fields that are not named here are accepted and ignored.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"] | {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"apiKey": []}],
    }


def _describe(operation: _Operation) -> dict[str, Any]:
    schema = _ANY_OBJECT | ({"required": list(operation.required)} if operation.required else {})
    content: dict[str, Any] = {operation.content_type: {"schema": schema}}
    if operation.content_type != "application/json":
        content = {operation.content_type: {"schema": {"type": "string"}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"$ref": _REF.format(model="AnthropicError" if operation.anthropic else "Error")}
    refusal = {"description": "Refused or failed", "content": {"application/json": {"schema": error}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "OK", "content": content}, "4XX": refusal, "5XX": refusal},
    }
    if operation.body is not None:
        body = {"$ref": _REF.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if "{name}" in operation.path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.query:
        described["parameters"] = [
            {"name": name, "in": "query", "required": True, "schema": {"type": "string"}} for name in operation.query
        ]
    return described


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}},
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}

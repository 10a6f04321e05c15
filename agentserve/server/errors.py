"""From errors to HTTP: one table, a shape for each family of dialects.

A failure of an OpenAI route is `{"error": {"message", "type", "param", "code"}}`, one of an Anthropic route
`{"type": "error", "error": {"type", "message"}, "request_id"}`. The SDKs turn them into exceptions of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agentserve.errors import (
    AgentServeError,
    AuthenticationError,
    ContextLengthExceededError,
    EngineError,
    ForbiddenHostError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    RequestTooLargeError,
)

MAX_RETRY_AFTER_S = 120
"""Clients do not retry at all when they are told to wait longer."""


class ShuttingDownError(RequestError):
    """The daemon drains: it finishes what it has and takes nothing new."""

    code = "shutting_down"


class SlowReaderError(RequestError):
    """A client reads its stream so slowly that its request was ended."""

    code = "client_too_slow"


class UnsupportedParameterError(RequestError):
    """A field asks for something that this server cannot do, and that must not be ignored."""

    code = "unsupported_parameter"


class ForbiddenToolError(RequestError):
    """A request forces a call of a tool that its agent must not call."""

    code = "tool_not_allowed"


class EndpointNotFoundError(RequestError):
    """No such path."""

    code = "not_found"


class MethodNotAllowedError(RequestError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"


# The first match wins, so subclasses stand before their bases.
_TABLE: tuple[tuple[type[AgentServeError], int, str], ...] = (
    (AuthenticationError, 401, "authentication_error"),
    (ForbiddenHostError, 403, "permission_error"),
    (ForbiddenToolError, 403, "permission_error"),
    (ModelNotFoundError, 404, "invalid_request_error"),
    (EndpointNotFoundError, 404, "invalid_request_error"),
    (MethodNotAllowedError, 405, "invalid_request_error"),
    (RequestTooLargeError, 413, "invalid_request_error"),
    # 503 rather than 429: one widely used agent retries every 5xx but never a 429.
    (QueueFullError, 503, "overloaded_error"),
    (ShuttingDownError, 503, "overloaded_error"),
    (RequestError, 400, "invalid_request_error"),
    (EngineError, 500, "server_error"),
)


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    417: "invalid_request_error",
    503: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as HTTP sees it, independent of the dialect."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    anthropic_message: str | None = None
    """Where clients of that dialect look for other words."""

    def anthropic_body(self, request_id: str | None) -> dict[str, Any]:
        """The JSON object of the Anthropic dialect; also an event of its streams."""
        error_type = _ANTHROPIC_TYPES.get(self.status, "api_error")
        message = self.anthropic_message or self.message
        return {"type": "error", "error": {"type": error_type, "message": message}, "request_id": request_id}

    def body(self) -> dict[str, Any]:
        """The JSON object of the OpenAI dialect."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(self.retry_after_s), "x-should-retry": "true"}

    def response(self, *, anthropic: bool = False, request_id: str | None = None) -> web.Response:
        body = self.anthropic_body(request_id) if anthropic else self.body()
        return web.json_response(body, status=self.status, headers=self.headers())


def describe_error(error: Exception) -> ErrorReply:
    """Maps any exception. Those that are not ours say nothing about what happened inside; the caller logs them."""
    for error_class, status, error_type in _TABLE:
        if isinstance(error, error_class):
            return ErrorReply(
                status,
                error_type,
                str(error),
                param=getattr(error, "param", None),
                code=getattr(error, "code", None) or ("engine_error" if isinstance(error, EngineError) else None),
                retry_after_s=_retry_after_s(error),
                anthropic_message=_anthropic_message(error),
            )
    return ErrorReply(500, "server_error", "Internal error; the server's log has the details.", code="internal_error")


def _anthropic_message(error: AgentServeError) -> str | None:
    if isinstance(error, ContextLengthExceededError):
        return f"prompt is too long: {error.num_tokens} tokens > {error.max_model_len} maximum"
    return None


def _retry_after_s(error: AgentServeError) -> int | None:
    if isinstance(error, QueueFullError):
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(error.retry_after_s)))
    return 5 if isinstance(error, ShuttingDownError) else None

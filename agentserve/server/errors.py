"""From errors to HTTP: one table, one shape.

Every failure of an OpenAI route is `{"error": {"message", "type", "param", "code"}}`, which the SDKs turn into
exceptions of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agentserve.errors import (
    AgentServeError,
    AuthenticationError,
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


class UnsupportedParameterError(RequestError):
    """A field asks for something that this server cannot do, and that must not be ignored."""

    code = "unsupported_parameter"


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


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as HTTP sees it, independent of the dialect."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """The JSON object of the OpenAI dialect."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(self.retry_after_s), "x-should-retry": "true"}

    def response(self) -> web.Response:
        return web.json_response(self.body(), status=self.status, headers=self.headers())


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
            )
    return ErrorReply(500, "server_error", "Internal error; the server's log has the details.", code="internal_error")


def _retry_after_s(error: AgentServeError) -> int | None:
    if isinstance(error, QueueFullError):
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(error.retry_after_s)))
    return 5 if isinstance(error, ShuttingDownError) else None

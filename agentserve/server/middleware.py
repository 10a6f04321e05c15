"""What happens around every handler: who may come in, what every answer carries, what becomes of errors."""

from __future__ import annotations

import logging
import re
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from agentserve import __version__
from agentserve.errors import AgentServeError, RequestTooLargeError
from agentserve.server.errors import EndpointNotFoundError, ErrorReply, MethodNotAllowedError, describe_error
from agentserve.server.security import (
    ALLOWED_HEADERS,
    check_api_key,
    check_host,
    check_origin,
    is_allowed_origin,
    is_loopback,
)
from agentserve.server.state import REQUEST_ID, STATE

logger = logging.getLogger("agentserve.request")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_EXPOSED_HEADERS = "X-Request-Id, request-id, x-agentserve-executor, Retry-After, x-should-retry"


@web.middleware
async def handle_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id and turns whatever is raised into an answer of the API's own shape."""
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _reply(request, _translate(request, error), error)
    except AgentServeError as error:
        return _reply(request, error, None)
    except Exception as error:
        logger.exception("id=%s %s %s failed", request[REQUEST_ID], request.method, _shown_path(request))
        return _respond(request, describe_error(error))


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Checks Host, Origin and key. Preflights are answered here: they carry no key."""
    options = request.app[STATE].options
    host, origin = request.headers.get("Host"), request.headers.get("Origin")
    if is_loopback(options.host):
        check_host(host)
    check_origin(origin, host)
    if request.method == "OPTIONS":
        return web.Response(status=204)
    if request.path != "/health":
        check_api_key(request.headers, options.api_key)
    return await handler(request)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds what every answer carries. Runs when headers are about to be sent, so streams have them, too."""
    state = request.app[STATE]
    response.headers["Server"] = f"agentserve/{__version__}"
    response.headers["x-agentserve-executor"] = state.options.executor
    request_id = request.get(REQUEST_ID)
    if request_id is not None:  # None: refused for its `Expect` header before any middleware ran
        response.headers["X-Request-Id"] = request_id
        response.headers["request-id"] = request_id  # where the Anthropic SDK looks for it
    origin = request.headers.get("Origin")
    if origin is None or not is_allowed_origin(origin, request.headers.get("Host")):
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Vary"] = "Origin"
    response.headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = "GET, HEAD, POST, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
        response.headers["Access-Control-Max-Age"] = "86400"


def _translate(request: web.Request, error: web.HTTPException) -> Exception:
    if isinstance(error, web.HTTPNotFound):
        return EndpointNotFoundError(f"There is no {request.method} {_shown_path(request)} here.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowedError(f"{_shown_path(request)} does not allow {request.method}.")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return RequestTooLargeError("The body is longer than this server's limit.")
    return error


def _reply(request: web.Request, error: Exception, http_error: web.HTTPException | None) -> web.Response:
    reply = describe_error(error)
    logger.info(
        "id=%s %s %s refused status=%d code=%s",
        request[REQUEST_ID],
        request.method,
        _shown_path(request),
        reply.status,
        reply.code,
    )
    response = _respond(request, reply)
    if http_error is not None and "Allow" in http_error.headers:
        response.headers["Allow"] = http_error.headers["Allow"]
    return response


def _respond(request: web.Request, reply: ErrorReply) -> web.Response:
    """In the shape of the dialect that the client speaks."""
    anthropic = "anthropic-version" in request.headers or "/messages" in request.path
    return reply.response(anthropic=anthropic, request_id=request[REQUEST_ID])


def _shown_path(request: web.Request) -> str:
    """The path as it was sent: decoded, it could hold a line break and forge a line of the log."""
    return request.rel_url.raw_path[:200]

"""The pure parts: identity, locations, seeds, names."""

from __future__ import annotations

from typing import Any

import pytest
from multidict import CIMultiDict

from agentserve.errors import (
    AuthenticationError,
    ContextLengthExceededError,
    EngineError,
    ForbiddenHostError,
    InvalidRequestError,
    ModelError,
    ModelNotFoundError,
    QueueFullError,
    RequestTooLargeError,
)
from agentserve.server.body import format_location
from agentserve.server.errors import ShuttingDownError, describe_error
from agentserve.server.identity import identify
from agentserve.server.sampling import derive_seed
from agentserve.server.security import is_loopback

# Strongest first; each one wins over all that follow.
IDENTITY_SOURCES: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"x-claude-code-session-id": "claude"}, {}, "claude"),
    ({}, {"metadata": {"user_id": "user_1_account__session_0123-abcd"}}, "0123-abcd"),
    ({"session-id": "codex"}, {}, "codex"),
    ({"session_id": "old-codex"}, {}, "old-codex"),
    ({"X-Session-ID": "x-session"}, {}, "x-session"),
    ({"x-session-affinity": "affinity"}, {}, "affinity"),
    ({"x-client-request-id": "client-request"}, {}, "client-request"),
    ({}, {"session_id": "body"}, "body"),
    ({}, {"prompt_cache_key": "key"}, "key"),
    ({}, {"conversation": "conversation"}, "conversation"),
    ({}, {"metadata": {"user_id": "somebody"}}, "somebody"),
    ({}, {"user": "user"}, "user"),
]


@pytest.mark.parametrize("strongest", range(len(IDENTITY_SOURCES)))
def test_the_first_name_of_a_session_wins(strongest: int) -> None:
    headers: CIMultiDict[str] = CIMultiDict()
    body: dict[str, Any] = {}
    for more_headers, more_body, _ in reversed(IDENTITY_SOURCES[strongest:]):
        headers.update(more_headers)
        body.update(more_body)
    assert identify(headers, body).session_id == IDENTITY_SOURCES[strongest][2]


@pytest.mark.parametrize(
    ("body", "session_id"),
    [
        ({}, None),
        ({"user": 3, "metadata": [], "session_id": None, "prompt_cache_key": ""}, None),
        ({"metadata": {"user_id": '{"device_id": "d", "session_id": "s-9"}'}}, "s-9"),
        ({"metadata": {"user_id": "{not json"}}, "{not json"),
        ({"metadata": {"user_id": "{" * 5000}}, "{" * 256),
        ({"user": " a\nb\x00 "}, "ab"),
        ({"user": "u" * 1000}, "u" * 256),
    ],
)
def test_odd_identities(body: dict[str, Any], session_id: str | None) -> None:
    assert identify({"Authorization": "Bearer shared-by-all"}, body).session_id == session_id


@pytest.mark.parametrize(
    ("error", "status", "error_type", "code"),
    [
        (InvalidRequestError("m", param="p"), 400, "invalid_request_error", None),
        (ContextLengthExceededError(9, 5), 400, "invalid_request_error", "context_length_exceeded"),
        (AuthenticationError("m"), 401, "authentication_error", "invalid_api_key"),
        (ForbiddenHostError("m"), 403, "permission_error", "forbidden_host"),
        (ModelNotFoundError("m"), 404, "invalid_request_error", "model_not_found"),
        (RequestTooLargeError("m"), 413, "invalid_request_error", "request_too_large"),
        (QueueFullError("m", retry_after_s=1), 503, "overloaded_error", "overloaded"),
        (ShuttingDownError("m"), 503, "overloaded_error", "shutting_down"),
        (EngineError("m"), 500, "server_error", "engine_error"),
        (ModelError("m"), 500, "server_error", "internal_error"),
        (ValueError("m"), 500, "server_error", "internal_error"),
    ],
)
def test_error_table(error: Exception, status: int, error_type: str, code: str | None) -> None:
    reply = describe_error(error)
    assert (reply.status, reply.type, reply.code) == (status, error_type, code)


def test_retry_after_is_one_that_clients_obey() -> None:
    headers = describe_error(QueueFullError("m", retry_after_s=1000)).headers()
    assert headers == {"Retry-After": "120", "x-should-retry": "true"}
    assert describe_error(ValueError("m")).headers() == {}


def test_locations_read_like_javascript() -> None:
    assert format_location(("messages", 0, "content", 1, "text")) == "messages[0].content[1].text"
    assert format_location(()) == "body"


def test_derived_seeds() -> None:
    assert derive_seed(7, 0) == 7
    assert derive_seed(-1, 0) == 2**63 - 1
    seeds = {derive_seed(seed, index) for seed in (7, 8) for index in range(4)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, 3) == derive_seed(7, 3)


@pytest.mark.parametrize("host", ["localhost", "LocalHost.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"])
def test_loopback_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "[", "127"]
)
def test_other_names(host: str) -> None:
    assert not is_loopback(host)

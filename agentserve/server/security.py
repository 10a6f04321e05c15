"""Who may talk to the server: keys, Host and Origin headers."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from agentserve.errors import AuthenticationError, ForbiddenHostError

_LOCAL_SCHEMES = ("http", "https")
_EDITOR_SCHEME = "vscode-webview"
ALLOWED_HEADERS = (
    "Authorization, Content-Type, Accept, x-api-key, anthropic-version, anthropic-beta, "
    "anthropic-dangerous-direct-browser-access, OpenAI-Beta, OpenAI-Organization, OpenAI-Project, "
    "x-agent-id, x-agent-distance, x-agent-program, x-agent-last-turn, "
    "x-request-id, x-client-request-id, session-id, x-session-id, x-session-affinity, x-claude-code-session-id, "
    "x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, x-stainless-helper-method, "
    "x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-poll-helper, "
    "x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be this machine. Unknown names are not: they may resolve to anything."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_host(header: str | None) -> None:
    """Refuses a request to a loopback server that was addressed to another name.

    A web page can make its own name resolve to 127.0.0.1 and then read our answers as if they were its own (DNS
    rebinding); the browser still sends that name. Raises ForbiddenHostError. A missing header is no browser's.
    """
    if header is None:
        return
    if not is_loopback(_hostname("http://" + header) or ""):
        raise ForbiddenHostError(f"The host {header[:200]!r} is not served here.")


def is_allowed_origin(origin: str, host_header: str | None) -> bool:
    """Whether pages of an origin may use the server: local ones, editor views, and pages that it served itself."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme == _EDITOR_SCHEME:
        return True
    if parts.scheme not in _LOCAL_SCHEMES:
        return False
    return is_loopback(_hostname(origin) or "") or (host_header is not None and parts.netloc == host_header)


def check_origin(origin: str | None, host_header: str | None) -> None:
    """Refuses foreign web pages: a simple POST needs no preflight, so CORS alone would let them spend our time.

    Raises ForbiddenHostError.
    """
    if origin is not None and not is_allowed_origin(origin, host_header):
        raise ForbiddenHostError(f"Pages of {origin[:200]!r} may not use this server.", code="forbidden_origin")


def check_api_key(headers: Mapping[str, str], api_key: str | None) -> None:
    """Accepts `Authorization: Bearer KEY` and `x-api-key: KEY`. Raises AuthenticationError."""
    if api_key is None:
        return
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    given = [headers.get("x-api-key", "")]
    if scheme.lower() == "bearer":
        given.append(token.strip())
    expected = api_key.encode()
    # Every candidate is compared in full, so the time says nothing about the key.
    matches = [hmac.compare_digest(key.encode("utf-8", "surrogateescape"), expected) for key in given]
    if not any(matches):
        raise AuthenticationError("The API key is missing or wrong.")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None

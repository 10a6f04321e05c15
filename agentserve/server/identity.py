"""Who asks? Agents name their session in many ways; the first one that is there wins.

An API key is never used: all agents of a machine may share one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.types import Identity

_MAX_LENGTH = 256
_DISTANCE_HEADER = "X-Agent-Distance"
_LAST_TURN_HEADER = "X-Agent-Last-Turn"
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_SESSION_IN_USER_ID = re.compile(r"session_([0-9A-Za-z-]{8,})$")
_EARLY_HEADERS = ("X-Claude-Code-Session-Id",)
# `X-Client-Request-Id` comes last of the headers: some clients change it with every request.
_LATE_HEADERS = ("Session-Id", "Session_id", "X-Session-ID", "X-Session-Affinity", "X-Client-Request-Id")


def identify(headers: Mapping[str, str], body: Mapping[str, Any]) -> Identity:
    """Who asks, from the headers (case-insensitive mapping) and the body; None where nothing is said.

    No client names a task by itself, and none says that its last turn has come: these two are for those who write one.
    Raises InvalidRequestError for a distance that is no number, and for a last turn that is neither true nor false.
    """
    given = body.get("metadata")
    metadata: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    user_id = metadata.get("user_id")
    user_id = user_id if isinstance(user_id, str) else None
    session_id = (
        _first(headers, _EARLY_HEADERS)
        or _session_in(user_id)
        or _first(headers, _LATE_HEADERS)
        or _first(body, ("session_id", "prompt_cache_key", "conversation"))
        or _clean(user_id)
        or _first(body, ("user",))
    )
    return Identity(
        session_id=session_id,
        agent_id=_first(headers, ("X-Agent-Id",)) or _first(body, ("agent_id",)),
        distance=_distance(headers),
        program_id=_first(headers, ("X-Agent-Program",)) or _first(metadata, ("program_id",)),
        is_last_turn=_is_last_turn(headers, metadata),
    )


def _is_last_turn(headers: Mapping[str, str], metadata: Mapping[str, Any]) -> bool | None:
    """What a call says about being the last one of its task. Raises InvalidRequestError for anything but yes and no."""
    said: Any = headers.get(_LAST_TURN_HEADER)
    param = _LAST_TURN_HEADER.lower()
    if said is None:
        said, param = metadata.get("last_turn"), "metadata.last_turn"
    if said is None or isinstance(said, bool):
        return said
    known = _BOOLEANS.get(said.strip().lower()) if isinstance(said, str) else None
    if known is None:
        raise InvalidRequestError(f"{param}: expected true or false, not {str(said)[:32]!r}", param=param)
    return known


def _distance(headers: Mapping[str, str]) -> float | None:
    """What a call says about the distance of its agent's next one. Raises InvalidRequestError for no such number."""
    text: Any = headers.get(_DISTANCE_HEADER)
    if text is None:
        return None
    try:
        distance = float(text)
    except ValueError:
        distance = math.nan
    if not math.isfinite(distance) or distance < 0:
        raise InvalidRequestError(
            f"{_DISTANCE_HEADER}: expected a finite number from 0 on, not {text[:32]!r}", param=_DISTANCE_HEADER.lower()
        )
    return distance


def _session_in(user_id: str | None) -> str | None:
    """The session inside a `user_id`: JSON with `session_id`, or a name that ends in `session_<id>`."""
    if user_id is None:
        return None
    if user_id.startswith("{"):
        try:
            fields = json.loads(user_id)
        except (ValueError, RecursionError):
            return None
        return _first(fields, ("session_id",))
    match = _SESSION_IN_USER_ID.search(user_id)
    return _clean(match.group(1)) if match else None


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = _clean(fields.get(name))
        if value is not None:
            return value
    return None


def _clean(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    printable = "".join(char for char in value[:_MAX_LENGTH] if char.isprintable())
    return printable.strip() or None

"""What makes two messages the same, whatever a client did to them on their way back.

Clients drop the reasoning, write the arguments of a call with other spaces and keys in another order, trim texts, and
give calls other ids. None of that is an edit. Everything else is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SYSTEM_ROLES = ("system", "developer")
_DIGEST_SIZE = 16
_MAX_EXACT = 2**53


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer as its client knows it: visible text and complete tool calls, without the reasoning."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments (JSON) of each call."""

    def digest(self, before: bytes) -> bytes:
        """The digest of a conversation that this answer goes on with; `before` is that of the conversation so far."""
        calls = [[name, canonical_arguments(arguments)] for name, arguments in self.calls]
        return _chain(before, ["assistant", self.text.strip(), calls])


def turn_of(message: Mapping[str, Any]) -> Turn:
    """The turn that an assistant message shows. `message` is in OpenAI's form with one string as its content."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return Turn(
        str(message["content"]), tuple((function["name"], function.get("arguments") or "") for function in functions)
    )


def chain_digests(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """For each message a digest of all messages up to it, 16 bytes; those of equal conversations are equal."""
    digests: list[bytes] = []
    digest = b""
    for message in messages:
        if message["role"] == "assistant":
            digest = turn_of(message).digest(digest)
        else:
            digest = _chain(digest, [message["role"], message.get("name"), str(message["content"])])
        digests.append(digest)
    return digests


def canonical_arguments(arguments: Any) -> str:
    """Arguments of a call, JSON text or a value, in one way to write them. Text that is no JSON stays as it is."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return str(arguments)
    return json.dumps(_canonical(arguments), sort_keys=True, separators=(",", ":"))


def conversation_name(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """A name for a conversation whose client gives none: it follows from its first message that is no system prompt."""
    for message in messages:
        if message["role"] not in _SYSTEM_ROLES:
            text = f"{message['role']}\0{message['content']}"
            return "~" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return None


def system_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The system prompt of an arranged conversation; empty if there is none."""
    first = messages[0] if messages else None
    return str(first["content"]) if first is not None and first["role"] in _SYSTEM_ROLES else ""


def _canonical(value: Any) -> Any:
    """JavaScript has one kind of number: it writes 1.0 as 1."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        return int(value)
    return value


def _chain(before: bytes, fields: list[Any]) -> bytes:
    text = json.dumps(fields, ensure_ascii=True)
    return hashlib.blake2b(before + text.encode(), digest_size=_DIGEST_SIZE).digest()

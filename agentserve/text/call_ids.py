"""Ids of tool calls for chat templates that accept no others than their own.

Mistral's templates refuse every id that has not nine letters or digits, and those of other servers have more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LENGTH = 9
_DEMAND = re.compile(r"\bid\s*\|\s*length\s*!=\s*9")
_FITS = re.compile(r"[A-Za-z0-9]{9}")
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def demands_short_ids(template: str) -> bool:
    """Whether a chat template refuses ids of calls that have not nine characters."""
    return _DEMAND.search(template) is not None


def short_id(call_id: str) -> str:
    """Nine letters and digits that depend on `call_id` only, which is returned if it is of that form already."""
    if _FITS.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    characters = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[digit])
    return "".join(characters)


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation, in OpenAI's form, with such ids; a call and its result keep the same one.

    A call without an id is named after its place, a result without one belongs to the first call that has none yet.
    So a conversation that grows keeps the ids that it had.
    """
    renamed: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for index, message in enumerate(messages):
        changed = dict(message)
        if message.get("tool_calls"):
            calls = []
            for place, call in enumerate(message["tool_calls"]):
                new_id = short_id(str(call.get("id") or f"{index}-{place}"))
                calls.append({**call, "id": new_id})
                open_ids.append(new_id)
            changed["tool_calls"] = calls
        elif message.get("role") == "tool":
            stated = message.get("tool_call_id")
            new_id = short_id(str(stated)) if stated else open_ids[0] if open_ids else short_id(str(index))
            if new_id in open_ids:
                open_ids.remove(new_id)
            changed["tool_call_id"] = new_id
        renamed.append(changed)
    return renamed

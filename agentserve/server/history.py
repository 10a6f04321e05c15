"""Conversations in the order that chat templates can render, whatever order a client sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SYSTEM_ROLES = ("system", "developer")
_OPENING, _CLOSING = "<system-reminder>\n", "\n</system-reminder>"


def arrange(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merges the leading system messages into one and folds later ones into the text beside them.

    Many templates allow one system message, at the start. A later one is never moved there: that would change the
    prompt from its beginning, and everything that is cached behind it would be lost. It becomes part of the user or
    tool message before it, else of the one after it, else a user message of its own; never does it come between a tool
    call and its result. So a conversation that grows renders as a prompt that grows.

    `messages` are in OpenAI's form, each with one string as its content; they are not changed.
    """
    num_leading = 0
    while num_leading < len(messages) and messages[num_leading]["role"] in _SYSTEM_ROLES:
        num_leading += 1
    arranged: list[dict[str, Any]] = []
    if num_leading:
        text = _join(str(message["content"]) for message in messages[:num_leading])
        arranged.append({**messages[0], "content": text})
    waiting: list[str] = []
    for message in messages[num_leading:]:
        role = message["role"]
        if role in _SYSTEM_ROLES:
            text = f"{_OPENING}{message['content']}{_CLOSING}"
            if arranged and arranged[-1]["role"] in ("user", "tool"):
                _append(arranged[-1], text)
            else:
                waiting.append(text)
        elif waiting and role == "user":
            arranged.append({**message, "content": _join([*waiting, str(message["content"])])})
            waiting = []
        elif waiting and role == "tool":
            arranged.append({**message, "content": _join([str(message["content"]), *waiting])})
            waiting = []
        else:
            if waiting:
                arranged.append({"role": "user", "content": _join(waiting)})
                waiting = []
            arranged.append(dict(message))
    if waiting:
        arranged.append({"role": "user", "content": _join(waiting)})
    return arranged


def _append(message: dict[str, Any], text: str) -> None:
    message["content"] = _join([str(message["content"]), text])


def _join(texts: Any) -> str:
    return "\n\n".join(text for text in texts if text)

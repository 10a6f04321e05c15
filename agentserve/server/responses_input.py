"""From the input items of `/v1/responses` to the messages that chat templates know."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.errors import UnsupportedParameterError
from agentserve.server.responses_tools import custom_arguments, joined_name, unseal
from agentserve.server.tool_fields import object_field, text_field

logger = logging.getLogger(__name__)
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_skipped_seen: set[str] = set()
_MAX_SEEN = 64


def parse_input(value: Any, instructions: str | None) -> list[dict[str, Any]]:
    """The input, a text or a list of items, behind the instructions. Raises InvalidRequestError."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not (value or messages):
        raise InvalidRequestError("input: must be a text or a list of items that is not empty", param="input")
    reader = _Reader(messages)
    for index, item in enumerate(value):
        reader.add(object_field(item, f"input[{index}]"), f"input[{index}]")
    reader.flush()
    if not messages:
        raise InvalidRequestError("input: there is no message in it", param="input")
    return messages


class _Reader:
    """Puts reasoning, text and calls that follow each other into one message: they were one answer."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages
        self._answer: dict[str, Any] | None = None

    def flush(self) -> None:
        if self._answer is not None:
            self._messages.append(self._answer)
            self._answer = None

    def add(self, item: Mapping[str, Any], param: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._add_message(item, param)
        elif kind == "reasoning":
            self._add_reasoning(item, param)
        elif kind == "function_call":
            namespace = item.get("namespace")
            name = joined_name(
                text_field(item.get("name"), f"{param}.name"), namespace if isinstance(namespace, str) else None
            )
            self._add_call(item, name, text_field(item.get("arguments"), f"{param}.arguments", default=""), param)
        elif kind == "custom_tool_call":
            name = text_field(item.get("name"), f"{param}.name")
            self._add_call(item, name, custom_arguments(text_field(item.get("input"), f"{param}.input")), param)
        elif kind == "local_shell_call":
            self._add_call(item, "local_shell", json.dumps(item.get("action"), ensure_ascii=False), param)
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            self._add_output(item, param)
        elif kind == "item_reference":
            raise UnsupportedParameterError(f"{param}: no items are stored here; send the item itself", param=param)
        elif isinstance(kind, str):
            _skip(kind)
        else:
            raise InvalidRequestError(f"{param}.type: must be a string", param=f"{param}.type")

    def _add_message(self, item: Mapping[str, Any], param: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidRequestError(f"{param}.role: must be one of {', '.join(_ROLES)}", param=f"{param}.role")
        text = _parse_content(item.get("content"), f"{param}.content")
        if role != "assistant":
            self.flush()
            self._messages.append({"role": role, "content": text})
            return
        if self._answer is not None and (self._answer["content"] or self._answer.get("tool_calls")):
            self.flush()
        self._open()["content"] = text

    def _add_reasoning(self, item: Mapping[str, Any], param: str) -> None:
        text = "".join(
            _parse_content(item[name], f"{param}.{name}") for name in ("content",) if isinstance(item.get(name), list)
        ) or unseal(item.get("encrypted_content"))
        if not text:
            return
        if self._answer is not None and (self._answer["content"] or self._answer.get("tool_calls")):
            self.flush()
        answer = self._open()
        answer["reasoning_content"] = answer.get("reasoning_content", "") + text

    def _add_call(self, item: Mapping[str, Any], name: str, arguments: str, param: str) -> None:
        call_id = text_field(item.get("call_id"), f"{param}.call_id")
        function = {"name": name, "arguments": arguments}
        calls = self._open().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def _add_output(self, item: Mapping[str, Any], param: str) -> None:
        self.flush()
        call_id = text_field(item.get("call_id", item.get("id")), f"{param}.call_id")
        output = item.get("output")
        if isinstance(output, dict):
            output = json.dumps(output, ensure_ascii=False)
        text = _parse_content(output, f"{param}.output", from_tool=True)
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _open(self) -> dict[str, Any]:
        if self._answer is None:
            self._answer = {"role": "assistant", "content": ""}
        return self._answer


def _parse_content(content: Any, param: str, *, from_tool: bool = False) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequestError(f"{param}: must be a string or a list of parts", param=param)
    texts = []
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        fields = object_field(part, place)
        kind = fields.get("type", "text")
        if kind in _TEXT_PARTS:
            texts.append(text_field(fields.get("text"), f"{place}.text"))
        elif kind == "refusal":
            texts.append(text_field(fields.get("refusal"), f"{place}.refusal"))
        elif from_tool:
            # A tool has made it already: to refuse it would end the session for good.
            texts.append(f"[{str(kind)[:32]} left out: this model reads text only]")
        else:
            raise InvalidRequestError(f"{place}: only text parts are supported", param=place)
    return "\n".join(texts)


def _skip(kind: str) -> None:
    """Says once that an item has no meaning here: it belongs to a tool that runs at the provider."""
    if kind not in _skipped_seen and len(_skipped_seen) < _MAX_SEEN:
        _skipped_seen.add(kind)
        logger.warning("input items of type %.64r have no meaning here and are left out", kind)

"""From the messages of the Anthropic dialect to those that chat templates know."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.anthropic_schema import AnthropicMessage
from agentserve.server.tool_fields import object_field, text_field

logger = logging.getLogger(__name__)
_BILLING_HEADER = "x-anthropic-billing-header"
_seen: set[str] = set()

# Blocks that say nothing to this model: thinking that only its author can read, and what tools of the provider did.
_SILENT_BLOCKS = (
    "redacted_thinking",
    "server_tool_use",
    "web_search_tool_result",
    "web_fetch_tool_result",
    "code_execution_tool_result",
    "tool_search_tool_result",
    "container_upload",
    "compaction",
)


def parse_system(system: Any) -> list[dict[str, Any]]:
    """The system prompt, a string or a list of text blocks, as at most one message. Raises InvalidRequestError.

    `cache_control` has no influence: markers that move from turn to turn would change the prompt.
    """
    if system is None:
        return []
    texts = [system] if isinstance(system, str) else _texts(system, "system")
    text = "\n".join(kept for kept in map(_strip_billing_header, texts) if kept)
    return [{"role": "system", "content": text}] if text else []


def parse_message(message: AnthropicMessage, index: int) -> list[dict[str, Any]]:
    """One message as several, as tool results are messages of their own. Raises InvalidRequestError."""
    param = f"messages[{index}].content"
    if message.role == "system":
        texts = [message.content] if isinstance(message.content, str) else _texts(message.content, param)
        return [{"role": "system", "content": "\n".join(texts)}]
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = [(f"{param}[{at}]", object_field(block, f"{param}[{at}]")) for at, block in _enumerate(message, param)]
    return _parse_user(blocks) if message.role == "user" else [_parse_assistant(blocks)]


def _enumerate(message: AnthropicMessage, param: str) -> Sequence[tuple[int, Any]]:
    if not isinstance(message.content, list):
        raise InvalidRequestError(f"{param}: must be a string or a list of blocks", param=param)
    return list(enumerate(message.content))


def _parse_user(blocks: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Tool results first: nothing may stand between a call and its result."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for param, block in blocks:
        kind = block.get("type")
        if kind == "tool_result":
            results.append(_parse_tool_result(block, param))
        elif kind == "text":
            texts.append(text_field(block.get("text"), f"{param}.text"))
        elif kind in ("document", "search_result"):
            texts.append(_document_text(block, param))
        elif kind not in _SILENT_BLOCKS:
            raise InvalidRequestError(f"{param}: blocks of type {_shown(kind)} are not supported", param=param)
    if texts or not results:
        results.append({"role": "user", "content": "\n".join(texts)})
    return results


def _parse_tool_result(block: Mapping[str, Any], param: str) -> dict[str, Any]:
    content = block.get("content")
    if content is None or isinstance(content, str):
        text = content or ""
    elif isinstance(content, list):
        parts = [object_field(part, f"{param}.content[{at}]") for at, part in enumerate(content)]
        text = "\n".join(_result_text(part, f"{param}.content[{at}]") for at, part in enumerate(parts))
    else:
        raise InvalidRequestError(f"{param}.content: must be a string or a list of blocks", param=f"{param}.content")
    if block.get("is_error") is True and not text.lower().startswith("error"):
        text = f"Error: {text}"
    call_id = text_field(block.get("tool_use_id"), f"{param}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _result_text(part: Mapping[str, Any], param: str) -> str:
    kind = part.get("type")
    if kind == "text":
        return text_field(part.get("text"), f"{param}.text")
    if kind == "tool_reference":
        return f"tool: {part.get('tool_name')}"
    if kind in ("document", "search_result"):
        return _document_text(part, param)
    # A tool has made it already: to refuse it would end the session for good.
    return f"[{str(kind)[:32]} left out: this model reads text only]"


def _document_text(block: Mapping[str, Any], param: str) -> str:
    """The text of a document or a search result. Raises InvalidRequestError for one that is no text."""
    source = block.get("source")
    text: Any = None
    if isinstance(block.get("content"), list):
        text = "\n".join(_texts(block["content"], f"{param}.content"))
    elif isinstance(source, dict) and source.get("type") == "text":
        text = source.get("data")
    elif isinstance(source, dict) and source.get("type") == "content":
        content = source.get("content")
        text = content if isinstance(content, str) else "\n".join(_texts(content, f"{param}.source.content"))
    if not isinstance(text, str):
        raise InvalidRequestError(f"{param}: only documents of text are supported", param=param)
    title = block.get("title")
    return f"{title}\n{text}" if isinstance(title, str) and title else text


def _parse_assistant(blocks: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for param, block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(text_field(block.get("text"), f"{param}.text"))
        elif kind == "thinking":
            # Any signature will do: thoughts are not a secret here.
            thoughts.append(text_field(block.get("thinking"), f"{param}.thinking", default=""))
        elif kind == "tool_use":
            calls.append(
                {
                    "id": text_field(block.get("id"), f"{param}.id"),
                    "type": "function",
                    "function": {
                        "name": text_field(block.get("name"), f"{param}.name"),
                        "arguments": _arguments(block.get("input")),
                    },
                }
            )
        elif kind not in _SILENT_BLOCKS:
            raise InvalidRequestError(f"{param}: blocks of type {_shown(kind)} are not supported", param=param)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps({} if value is None else value, ensure_ascii=False)


def _texts(blocks: Any, param: str) -> list[str]:
    if not isinstance(blocks, list):
        raise InvalidRequestError(f"{param}: must be a string or a list of text blocks", param=param)
    texts = []
    for at, block in enumerate(blocks):
        fields = object_field(block, f"{param}[{at}]")
        if fields.get("type", "text") != "text":
            raise InvalidRequestError(f"{param}[{at}]: must be a text block", param=f"{param}[{at}]")
        texts.append(text_field(fields.get("text"), f"{param}[{at}].text"))
    return texts


def _strip_billing_header(text: str) -> str:
    """Removes a first line whose value changes with every request, so that no prefix would ever be found again."""
    if not text.startswith(_BILLING_HEADER):
        return text
    if _BILLING_HEADER not in _seen:
        _seen.add(_BILLING_HEADER)
        logger.info("%s is removed from system prompts: it changes with every request", _BILLING_HEADER)
    return text.partition("\n")[2]


def _shown(kind: Any) -> str:
    return repr(kind[:32]) if isinstance(kind, str) else "unknown"

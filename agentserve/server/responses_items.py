"""Output items of `/v1/responses`, whole or just begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentserve.server.dialect import JsonObject
from agentserve.server.responses_tools import ToolOrigin, custom_input, seal
from agentserve.server.types import TokenLogprob, Usage


def text_part(text: str, logprobs: Sequence[TokenLogprob] = ()) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": encode_logprobs(logprobs)}


def reasoning_part(text: str) -> JsonObject:
    return {"type": "reasoning_text", "text": text}


def message_item(item_id: str, parts: list[JsonObject], *, status: str = "completed") -> JsonObject:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": parts}


def reasoning_item(item_id: str, parts: list[JsonObject], *, sealed: bool, status: str = "completed") -> JsonObject:
    text = "".join(part["text"] for part in parts)
    return {
        "id": item_id,
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": parts,
        "encrypted_content": seal(text) if sealed and text else None,
    }


def call_item(item_id: str, call_id: str, origin: ToolOrigin, arguments: str, *, status: str) -> JsonObject:
    """A call of a function, or of a free-form tool."""
    item: JsonObject = {"id": item_id, "status": status, "call_id": call_id, "name": origin.name}
    if origin.namespace is not None:
        item["namespace"] = origin.namespace
    if origin.is_custom:
        return item | {"type": "custom_tool_call", "input": custom_input(arguments)}
    return item | {"type": "function_call", "arguments": arguments}


def encode_usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def encode_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token": entry.text,
            "bytes": list(entry.data),
            "logprob": entry.logprob,
            "top_logprobs": [{"token": top.text, "bytes": list(top.data), "logprob": top.logprob} for top in entry.top],
        }
        for entry in logprobs
    ]

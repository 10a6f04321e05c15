"""The encoder of `/v1/messages`. Clients dispatch on the *name* of each event."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from agentserve.core.request import FinishReason
from agentserve.server.dialect import ChoiceResult, JsonObject, ParsedCall, Part, ReplyHeader
from agentserve.server.errors import ErrorReply
from agentserve.server.types import ChoiceFinished, Delta, Finished, GenerationEvent, Usage
from agentserve.text.tools.spec import (
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolArgumentsDelta,
    ToolCallFinished,
    ToolCallStarted,
)

_SIGNATURE = "agentserve"
"""Clients send thoughts back only with a signature; here it proves nothing and none is checked."""


class MessagesEncoder:
    """Encodes one answer of `/v1/messages`. Content blocks follow each other; only one is open at a time."""

    names_events = True
    sends_done = False

    def __init__(self, header: ReplyHeader, call: ParsedCall) -> None:
        del call
        self._header = header
        self._num_blocks = 0
        self._open: str | None = None
        self._end: ChoiceFinished | None = None

    def open(self) -> Iterable[JsonObject]:
        # What is found in the cache is not known yet; the last event corrects the counts.
        usage = {
            "input_tokens": self._header.num_prompt_tokens,
            "output_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        yield {"type": "message_start", "message": self._message([], None, usage)}
        yield {"type": "ping"}

    def encode(self, event: GenerationEvent) -> Iterable[JsonObject]:
        if isinstance(event, Delta):
            for piece in event.pieces:
                yield from self._encode_piece(piece)
        elif isinstance(event, ChoiceFinished):
            yield from self._close_block()
            self._end = event
        elif isinstance(event, Finished):
            assert self._end is not None
            delta = {"stop_reason": _stop_reason(self._end), "stop_sequence": self._end.stop_string}
            yield {"type": "message_delta", "delta": delta, "usage": _encode_usage(event.usage)}
            yield {"type": "message_stop"}

    def fail(self, error: ErrorReply) -> Iterable[JsonObject]:
        yield error.anthropic_body(self._header.request_id)

    def keep_alive(self) -> JsonObject | None:
        return {"type": "ping"}

    def whole(self, choices: Sequence[ChoiceResult], usage: Usage) -> JsonObject:
        (choice,) = choices
        content = [_encode_part(part) for part in choice.parts]
        return self._message(content, choice.end, _encode_usage(usage))

    def _encode_piece(self, piece: Piece) -> Iterable[JsonObject]:
        if isinstance(piece, TextPiece):
            yield from self._open_block("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": piece.text})
        elif isinstance(piece, ReasoningPiece):
            yield from self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": piece.text})
        elif isinstance(piece, ToolCallStarted):
            yield from self._close_block()
            block = {"type": "tool_use", "id": _encode_id(piece.call_id), "name": piece.name, "input": {}}
            yield from self._open_block("tool_use", block)
        elif isinstance(piece, ToolArgumentsDelta):
            yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
        elif isinstance(piece, ToolCallFinished):
            yield from self._close_block()

    def _open_block(self, kind: str, block: JsonObject) -> Iterable[JsonObject]:
        if self._open == kind:
            return
        yield from self._close_block()
        self._open = kind
        yield {"type": "content_block_start", "index": self._num_blocks, "content_block": block}

    def _close_block(self) -> Iterable[JsonObject]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        yield {"type": "content_block_stop", "index": self._num_blocks}
        self._open = None
        self._num_blocks += 1

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}

    def _message(self, content: list[JsonObject], end: ChoiceFinished | None, usage: JsonObject) -> JsonObject:
        return {
            "id": self._header.id,
            "type": "message",
            "role": "assistant",
            "model": self._header.model,
            "content": content,
            "stop_reason": None if end is None else _stop_reason(end),
            "stop_sequence": None if end is None else end.stop_string,
            "usage": usage,
        }


def _stop_reason(end: ChoiceFinished) -> str:
    if end.reason is FinishReason.LENGTH:
        return "model_context_window_exceeded" if end.at_window else "max_tokens"
    if end.stop_string is not None:
        return "stop_sequence"
    return "tool_use" if end.calls_tools else "end_turn"


def _encode_usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
    }


def _encode_id(call_id: str) -> str:
    """`call_...` as `toolu_...`, as clients of this dialect know it."""
    return "toolu_" + call_id.removeprefix("call_")


def _encode_part(part: Part) -> JsonObject:
    if isinstance(part, TextPiece):
        return {"type": "text", "text": part.text}
    if isinstance(part, ReasoningPiece):
        return {"type": "thinking", "thinking": part.text, "signature": _SIGNATURE}
    return {
        "type": "tool_use",
        "id": _encode_id(part.call_id),
        "name": part.name,
        "input": _parse_arguments(part.arguments),
    }


def _parse_arguments(arguments: str) -> Any:
    """Complete arguments are JSON; whether they are an object, and one of sane depth, is up to the model."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) else {"value": value}

"""The encoder of `/v1/responses`. Every event has a type and a number; the last one is `response.completed`,
`response.incomplete` or `response.failed`, without which clients think that the connection broke.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentserve.core.request import FinishReason
from agentserve.server.dialect import ChoiceResult, JsonObject, Part, ReplyHeader
from agentserve.server.errors import ErrorReply
from agentserve.server.responses_items import (
    call_item,
    encode_logprobs,
    encode_usage,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
)
from agentserve.server.responses_parse import ResponsesCall
from agentserve.server.responses_tools import ToolOrigin, custom_input
from agentserve.server.types import ChoiceFinished, Delta, Finished, GenerationEvent, TokenLogprob, Usage
from agentserve.text.tools.spec import (
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolArgumentsDelta,
    ToolCallFinished,
    ToolCallStarted,
)

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written."""

    kind: str
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    call_id: str = ""
    origin: ToolOrigin | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ResponsesEncoder:
    """Encodes one answer of `/v1/responses`. Items follow each other; only one is open at a time."""

    names_events = True
    sends_done = False

    def __init__(self, header: ReplyHeader, call: ResponsesCall) -> None:
        self._header = header
        self._call = call
        self._sequence_number = 0
        self._items: list[JsonObject] = []
        self._num_opened = 0
        self._open: _OpenItem | None = None
        self._end: ChoiceFinished | None = None

    def open(self) -> Iterable[JsonObject]:
        yield self._event("response.created", response=self._response("in_progress", []))
        yield self._event("response.in_progress", response=self._response("in_progress", []))

    def keep_alive(self) -> JsonObject | None:
        # A comment would do for the connection, but not for clients that measure the time between events.
        return self._event("response.in_progress", response=self._response("in_progress", self._items))

    def encode(self, event: GenerationEvent) -> Iterable[JsonObject]:
        if isinstance(event, Delta):
            logprobs = event.logprobs
            for piece in event.pieces:
                yield from self._encode_piece(piece, logprobs)
                logprobs = ()
        elif isinstance(event, ChoiceFinished):
            self._end = event
            yield from self._close()
        elif isinstance(event, Finished):
            assert self._end is not None
            status = _status(self._end)
            response = self._response(status, self._items, usage=event.usage)
            yield self._event(f"response.{status}", response=response)

    def fail(self, error: ErrorReply) -> Iterable[JsonObject]:
        described = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response=self._response("failed", self._items, error=described))

    def whole(self, choices: Sequence[ChoiceResult], usage: Usage) -> JsonObject:
        (choice,) = choices
        items = [self._whole_item(index, part, choice) for index, part in enumerate(choice.parts)]
        return self._response(_status(choice.end), items, usage=usage)

    # ---- items ----

    def _encode_piece(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> Iterable[JsonObject]:
        if isinstance(piece, TextPiece):
            yield from self._open_text("message", text_part(""))
            assert self._open is not None
            self._open.texts.append(piece.text)
            self._open.logprobs.extend(logprobs)
            yield self._item_event(
                "response.output_text.delta", content_index=0, delta=piece.text, logprobs=encode_logprobs(logprobs)
            )
        elif isinstance(piece, ReasoningPiece):
            yield from self._open_text("reasoning", reasoning_part(""))
            assert self._open is not None
            self._open.texts.append(piece.text)
            yield self._item_event("response.reasoning_text.delta", content_index=0, delta=piece.text)
        elif isinstance(piece, ToolCallStarted):
            yield from self._close()
            origin = self._call.tools.origin(piece.name)
            kind = "custom_tool_call" if origin.is_custom else "function_call"
            self._open = _OpenItem(kind, self._item_id(kind), call_id=piece.call_id, origin=origin)
            item = call_item(self._open.id, piece.call_id, origin, "", status="in_progress")
            yield self._item_event("response.output_item.added", item=item)
        elif isinstance(piece, ToolArgumentsDelta):
            if self._open is not None and self._open.kind == "function_call":
                yield self._item_event("response.function_call_arguments.delta", delta=piece.text)
        else:
            yield from self._close_call(piece)

    def _open_text(self, kind: str, part: JsonObject) -> Iterable[JsonObject]:
        if self._open is not None and self._open.kind == kind:
            return
        yield from self._close()
        self._open = _OpenItem(kind, self._item_id(kind))
        item = self._text_item(self._open, [], status="in_progress")
        yield self._item_event("response.output_item.added", item=item)
        yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _close(self) -> Iterable[JsonObject]:
        """Ends an open text. An open call that is left like this was cut off: it is never shown as done."""
        if self._open is None:
            return
        if self._open.kind in ("message", "reasoning"):
            text = self._open.text
            if self._open.kind == "message":
                part = text_part(text, self._open.logprobs)
                yield self._item_event(
                    "response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"]
                )
            else:
                part = reasoning_part(text)
                yield self._item_event("response.reasoning_text.done", content_index=0, text=text)
            yield self._item_event("response.content_part.done", content_index=0, part=part)
            yield from self._done(self._text_item(self._open, [part], status="completed"))
        self._open = None

    def _close_call(self, piece: ToolCallFinished) -> Iterable[JsonObject]:
        opened = self._open
        if opened is None or opened.origin is None or not piece.complete:
            return
        if opened.origin.is_custom:
            text = custom_input(piece.arguments)
            yield self._item_event("response.custom_tool_call_input.delta", delta=text)
            yield self._item_event("response.custom_tool_call_input.done", input=text)
        else:
            yield self._item_event(
                "response.function_call_arguments.done", name=opened.origin.name, arguments=piece.arguments
            )
        yield from self._done(call_item(opened.id, opened.call_id, opened.origin, piece.arguments, status="completed"))
        self._open = None

    def _done(self, item: JsonObject) -> Iterable[JsonObject]:
        self._items.append(item)
        yield self._item_event("response.output_item.done", item=item)

    def _text_item(self, opened: _OpenItem, parts: list[JsonObject], *, status: str) -> JsonObject:
        if opened.kind == "message":
            return message_item(opened.id, parts, status=status)
        return reasoning_item(opened.id, parts, sealed=self._call.seal_reasoning, status=status)

    def _item_id(self, kind: str) -> str:
        self._num_opened += 1
        return self._make_id(kind, self._num_opened - 1)

    def _make_id(self, kind: str, index: int) -> str:
        return f"{_PREFIXES[kind]}_{self._header.id.removeprefix('resp_')}_{index}"

    def _whole_item(self, index: int, part: Part, choice: ChoiceResult) -> JsonObject:
        if isinstance(part, TextPiece):
            # Log-probabilities are not kept by part; they belong to the text where there is only one.
            alone = sum(isinstance(other, TextPiece) for other in choice.parts) == len(choice.parts) == 1
            logprobs = choice.logprobs if alone else ()
            return message_item(self._make_id("message", index), [text_part(part.text, logprobs)])
        if isinstance(part, ReasoningPiece):
            parts = [reasoning_part(part.text)]
            return reasoning_item(self._make_id("reasoning", index), parts, sealed=self._call.seal_reasoning)
        origin = self._call.tools.origin(part.name)
        kind = "custom_tool_call" if origin.is_custom else "function_call"
        return call_item(self._make_id(kind, index), part.call_id, origin, part.arguments, status="completed")

    # ---- events ----

    def _event(self, kind: str, **fields: Any) -> JsonObject:
        event = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _item_event(self, kind: str, **fields: Any) -> JsonObject:
        """An event about the open item."""
        assert self._open is not None
        if not kind.startswith("response.output_item."):
            fields["item_id"] = self._open.id
        return self._event(kind, output_index=self._num_opened - 1, **fields)

    def _response(
        self, status: str, items: list[JsonObject], *, usage: Usage | None = None, error: JsonObject | None = None
    ) -> JsonObject:
        return {
            "id": self._header.id,
            "object": "response",
            "created_at": self._header.created,
            "status": status,
            "model": self._header.model,
            "output": list(items),
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": None if usage is None else encode_usage(usage),
            **self._call.echo,
        }


def _status(end: ChoiceFinished) -> str:
    return "incomplete" if end.reason is FinishReason.LENGTH else "completed"

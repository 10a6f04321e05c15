"""The dialect of `/v1/chat/completions`: a pure parser and a per-stream encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.body import validate
from agentserve.server.dialect import ChoiceResult, JsonObject, ReplyHeader
from agentserve.server.openai_common import (
    OpenAICall,
    OpenAIEncoder,
    StreamUsage,
    encode_progress,
    encode_usage,
    parse_call_options,
    parse_sampling,
)
from agentserve.server.openai_schema import ChatBody, ChatMessage, refuse_unsupported
from agentserve.server.tool_fields import parse_chat_tools, parse_constraints, parse_tool_choice
from agentserve.server.types import (
    ChatPrompt,
    ChoiceFinished,
    Delta,
    Finished,
    GenerateRequest,
    GenerationEvent,
    Identity,
    Progress,
    TokenLogprob,
    Usage,
)
from agentserve.text.tools.spec import Piece, ReasoningPiece, TextPiece, ToolArgumentsDelta, ToolCallStarted


def parse_chat_request(body: JsonObject, identity: Identity) -> OpenAICall:
    """Raises InvalidRequestError, or UnsupportedParameterError for what must not be ignored."""
    chat = validate(ChatBody, body)
    refuse_unsupported(chat)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequestError("top_logprobs: only allowed when logprobs is true", param="top_logprobs")
    response_format, format_param = parse_constraints(body)
    stream, include_usage, continuous_usage = parse_call_options(chat)
    tools = parse_chat_tools(chat.tools)
    messages = tuple(_parse_message(message, index) for index, message in enumerate(chat.messages))
    generate = GenerateRequest(
        prompts=(ChatPrompt(messages, _template_kwargs(chat), tools),),
        prompt_param="messages",
        sampling=parse_sampling(
            chat,
            max_tokens=chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens,
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        ),
        num_choices=chat.n or 1,
        tool_choice=parse_tool_choice(chat.tool_choice, tools, parallel=chat.parallel_tool_calls is not False),
        response_format=response_format,
        format_param=format_param,
        with_progress=bool(chat.return_progress),
        identity=identity,
        priority=chat.priority or 0,
        cache_salt=chat.cache_salt,
    )
    return OpenAICall(generate, chat.model, stream, include_usage, continuous_usage)


def _template_kwargs(chat: ChatBody) -> Mapping[str, Any]:
    """Template variables; those that have a field of their own yield to `chat_template_kwargs`."""
    own = {"enable_thinking": chat.enable_thinking, "reasoning_effort": chat.reasoning_effort}
    return {name: value for name, value in own.items() if value is not None} | (chat.chat_template_kwargs or {})


def _parse_message(message: ChatMessage, index: int) -> Mapping[str, Any]:
    """The fields of a message that templates know, with one string as its content."""
    param = f"messages[{index}]"
    may_be_null = message.role == "assistant"
    parsed: dict[str, Any] = {"role": message.role, "content": _parse_content(message.content, param, may_be_null)}
    if message.name is not None:
        parsed["name"] = message.name
    if message.role == "tool" and message.tool_call_id is not None:
        parsed["tool_call_id"] = message.tool_call_id
    if message.role == "assistant":
        if message.tool_calls:
            parsed["tool_calls"] = [_parse_tool_call(call, f"{param}.tool_calls") for call in message.tool_calls]
        reasoning = message.reasoning_content or message.reasoning
        if isinstance(reasoning, str) and reasoning:
            parsed["reasoning_content"] = reasoning
    return parsed


def _parse_content(content: Any, param: str, may_be_null: bool) -> str:
    param += ".content"
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        raise InvalidRequestError(f"{param}: must be a string or a list of content parts", param=param)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if kind not in ("text", "refusal", None) or not isinstance(text, str):
            shown = f" (type {kind[:32]!r})" if isinstance(kind, str) else ""
            raise InvalidRequestError(
                f"{param}[{index}]: only text parts are supported{shown}", param=f"{param}[{index}]"
            )
        texts.append(text)
    # Parts are separate paragraphs, so that words do not run together.
    return "\n".join(texts)


def _parse_tool_call(call: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{param}: a call needs function.name", param=param)
    # The arguments may be no JSON, if the model was cut off or got them wrong: the template shows them as they are.
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": function.get("arguments", "")},
    }


class ChatEncoder(OpenAIEncoder):
    """Encodes one answer of `/v1/chat/completions`."""

    def __init__(self, header: ReplyHeader, call: OpenAICall) -> None:
        self._header = header
        self._num_choices = call.generate.num_choices
        self._with_logprobs = call.generate.sampling.logprobs is not None
        self._with_progress = call.generate.with_progress
        self._usage = StreamUsage(header.num_prompt_tokens, call.include_usage, call.continuous_usage, {})

    def open(self) -> Iterable[JsonObject]:
        for choice in range(self._num_choices):
            yield self._chunk(choice, {"role": "assistant", "content": ""}, None) | self._usage.fields()

    def encode(self, event: GenerationEvent) -> Iterable[JsonObject]:
        if isinstance(event, Delta):
            deltas = [delta for piece in event.pieces if (delta := _encode_piece(piece)) is not None]
            if not deltas and not event.logprobs:
                return
            # Log-probabilities are those of tokens, markup included: they travel with the first delta.
            logprobs = event.logprobs
            for delta in deltas or [{"content": ""}]:
                chunk = self._chunk(event.choice, delta, None, logprobs)
                yield chunk | self._usage.fields(event.choice, event.num_output_tokens)
                logprobs = ()
        elif isinstance(event, Progress):
            if self._with_progress:
                yield self._chunk(event.choice, {}, None) | encode_progress(event)
        elif isinstance(event, ChoiceFinished):
            chunk = self._chunk(event.choice, {}, _finish_reason(event))
            yield chunk | self._usage.fields(event.choice, event.num_output_tokens)
        elif isinstance(event, Finished) and self._usage.include:
            yield self._object("chat.completion.chunk", [], usage=encode_usage(event.usage))

    def whole(self, choices: Sequence[ChoiceResult], usage: Usage) -> JsonObject:
        encoded = [
            {
                "index": index,
                "message": _encode_message(choice),
                "logprobs": {"content": _encode_logprobs(choice.logprobs)} if self._with_logprobs else None,
                "finish_reason": _finish_reason(choice.end),
            }
            for index, choice in enumerate(choices)
        ]
        return self._object("chat.completion", encoded, usage=encode_usage(usage))

    def _chunk(
        self, choice: int, delta: JsonObject, reason: str | None, logprobs: tuple[TokenLogprob, ...] = ()
    ) -> JsonObject:
        encoded = {"content": _encode_logprobs(logprobs)} if logprobs else None
        entry = {"index": choice, "delta": delta, "logprobs": encoded, "finish_reason": reason}
        return self._object("chat.completion.chunk", [entry])

    def _object(self, kind: str, choices: list[JsonObject], **fields: Any) -> JsonObject:
        header = self._header
        return {
            "id": header.id,
            "object": kind,
            "created": header.created,
            "model": header.model,
            "choices": choices,
            **fields,
        }


def _encode_logprobs(logprobs: Sequence[TokenLogprob]) -> list[JsonObject]:
    return [
        _encode_logprob(entry) | {"top_logprobs": [_encode_logprob(top) for top in entry.top]} for entry in logprobs
    ]


def _encode_logprob(entry: TokenLogprob) -> JsonObject:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.data)}


def _finish_reason(end: ChoiceFinished) -> str:
    return "tool_calls" if end.calls_tools else end.reason.value


def _encode_piece(piece: Piece) -> JsonObject | None:
    if isinstance(piece, TextPiece):
        return {"content": piece.text}
    if isinstance(piece, ReasoningPiece):
        # Clients read one name or the other.
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    if isinstance(piece, ToolCallStarted):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": piece.call_id, "type": "function", "function": function}]}
    if isinstance(piece, ToolArgumentsDelta):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return None


def _encode_message(choice: ChoiceResult) -> JsonObject:
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in choice.tool_calls
    ]
    # Null beside calls, as clients expect it; but never both missing.
    message: JsonObject = {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = message["reasoning"] = choice.reasoning
    if calls:
        message["tool_calls"] = calls
    return message

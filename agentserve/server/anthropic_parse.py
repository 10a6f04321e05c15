"""The parser of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.anthropic_messages import parse_message, parse_system
from agentserve.server.anthropic_schema import CountTokensBody, MessagesBody
from agentserve.server.body import validate
from agentserve.server.dialect import JsonObject, ParsedCall
from agentserve.server.tool_fields import (
    check_names,
    make_choice,
    object_field,
    parse_function,
    parse_json_schema,
    skip_tool,
    text_field,
)
from agentserve.server.types import ChatPrompt, GenerateRequest, Identity, SamplingRequest
from agentserve.text.tools.spec import ResponseFormat, TextFormat, ToolChoice, ToolSpec

_MODES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}


def parse_messages_request(body: JsonObject, identity: Identity) -> ParsedCall:
    """Raises InvalidRequestError."""
    message = validate(MessagesBody, body)
    prompt = _parse_prompt(message)
    sampling = SamplingRequest(
        max_tokens=message.max_tokens,
        clamp_max_tokens=True,
        temperature=1.0 if message.temperature is None else message.temperature,
        top_p=1.0 if message.top_p is None else message.top_p,
        top_k=0 if message.top_k in (None, -1) else message.top_k,
        stop=tuple(message.stop_sequences or ()),
    )
    response_format, format_param = _parse_format(message)
    generate = GenerateRequest(
        prompts=(prompt,),
        prompt_param="messages",
        sampling=sampling,
        tool_choice=_parse_tool_choice(message.tool_choice, prompt.tools),
        response_format=response_format,
        format_param=format_param,
        identity=identity,
    )
    return ParsedCall(generate, message.model, bool(message.stream))


def parse_count_request(body: JsonObject, identity: Identity) -> ParsedCall:
    """Raises InvalidRequestError."""
    message = validate(CountTokensBody, body)
    prompt = _parse_prompt(message)
    _parse_tool_choice(message.tool_choice, prompt.tools)
    generate = GenerateRequest(
        prompts=(prompt,), prompt_param="messages", sampling=SamplingRequest(), identity=identity
    )
    return ParsedCall(generate, message.model, stream=False)


def _parse_prompt(body: CountTokensBody) -> ChatPrompt:
    messages = parse_system(body.system)
    for index, message in enumerate(body.messages):
        messages += parse_message(message, index)
    prefill = ""
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls") and len(messages) > 1:
        # An answer that the client has begun. The documented API wants no space at its end, nor do models.
        prefill = messages.pop()["content"].rstrip()
    return ChatPrompt(tuple(messages), _template_kwargs(body), _parse_tools(body.tools), prefill)


def _template_kwargs(body: CountTokensBody) -> Mapping[str, Any]:
    """Without a word about thinking, and for `adaptive`, the model does what its template says."""
    kind = (body.thinking or {}).get("type")
    kwargs: dict[str, Any] = {}
    if kind in ("enabled", "disabled"):
        kwargs["enable_thinking"] = kind == "enabled"
    if body.output_config is not None and body.output_config.effort is not None:
        kwargs["reasoning_effort"] = body.output_config.effort
    return kwargs


def _parse_tools(tools: list[Any] | None) -> tuple[ToolSpec, ...]:
    parsed = []
    for index, tool in enumerate(tools or ()):
        param = f"tools[{index}]"
        fields = object_field(tool, param)
        kind = fields.get("type")
        if kind in (None, "custom"):
            renamed = {**fields, "parameters": fields.get("input_schema")}
            parsed.append(parse_function(renamed, param))
        else:
            skip_tool(kind, param)
    return check_names(parsed)


def _parse_tool_choice(value: Any, tools: tuple[ToolSpec, ...]) -> ToolChoice:
    if value is None:
        return ToolChoice()
    fields = object_field(value, "tool_choice")
    kind = fields.get("type")
    mode = _MODES.get(kind) if isinstance(kind, str) else None
    if mode is None:
        raise InvalidRequestError("tool_choice.type: must be auto, any, tool or none", param="tool_choice.type")
    name = text_field(fields.get("name"), "tool_choice.name") if mode == "named" else None
    return make_choice(mode, name, tools, parallel=fields.get("disable_parallel_tool_use") is not True)


def _parse_format(body: MessagesBody) -> tuple[ResponseFormat, str]:
    """The form of the answer, and the field that says it. Raises InvalidRequestError."""
    value = body.output_config.format if body.output_config is not None else None
    param = "output_config.format" if value is not None else "output_format"
    value = body.output_format if value is None else value
    if value is None:
        return TextFormat(), param
    fields = object_field(value, param)
    if fields.get("type") != "json_schema":
        raise InvalidRequestError(f'{param}.type: must be "json_schema"', param=f"{param}.type")
    return parse_json_schema(fields.get("schema"), f"{param}.schema"), f"{param}.schema"

"""The parser of `/v1/responses` and `/v1/responses/input_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.body import validate
from agentserve.server.dialect import JsonObject, ParsedCall
from agentserve.server.responses_input import parse_input
from agentserve.server.responses_schema import InputTokensBody, ResponsesBody, refuse_state
from agentserve.server.responses_tools import ToolTable, joined_name, parse_tools
from agentserve.server.tool_fields import object_field, parse_json_schema, parse_response_format, parse_tool_choice
from agentserve.server.types import ChatPrompt, GenerateRequest, Identity, SamplingRequest
from agentserve.text.tools.spec import ResponseFormat, TextFormat, ToolChoice

_WITH_LOGPROBS = "message.output_text.logprobs"
_WITH_SEALED_REASONING = "reasoning.encrypted_content"


@dataclass(frozen=True, slots=True)
class ResponsesCall(ParsedCall):
    tools: ToolTable
    seal_reasoning: bool
    """Whether thoughts are also sent as `encrypted_content`."""
    echo: Mapping[str, Any]
    """Fields of the request that the answer repeats."""


def parse_responses_request(body: JsonObject, identity: Identity) -> ResponsesCall:
    """Raises InvalidRequestError, or UnsupportedParameterError for what needs stored state."""
    fields = validate(ResponsesBody, body)
    include = [name for name in fields.include or () if isinstance(name, str)]
    with_logprobs = _WITH_LOGPROBS in include or bool(fields.top_logprobs)
    sampling = SamplingRequest(
        max_tokens=fields.max_output_tokens,
        clamp_max_tokens=True,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        logprobs=(fields.top_logprobs or 0) if with_logprobs else None,
    )
    generate, tools = _parse_generate(fields, identity, sampling)
    return ResponsesCall(
        generate, fields.model, bool(fields.stream), tools, _WITH_SEALED_REASONING in include, _echo(fields)
    )


def parse_input_tokens_request(body: JsonObject, identity: Identity) -> ParsedCall:
    """Raises InvalidRequestError, or UnsupportedParameterError for what needs stored state."""
    fields = validate(InputTokensBody, body)
    generate, _ = _parse_generate(fields, identity, SamplingRequest())
    return ParsedCall(generate, fields.model, stream=False)


def _parse_generate(
    fields: InputTokensBody, identity: Identity, sampling: SamplingRequest
) -> tuple[GenerateRequest, ToolTable]:
    refuse_state(fields)
    tools = parse_tools(fields.tools)
    messages = parse_input(fields.input, fields.instructions)
    effort = fields.reasoning.effort if fields.reasoning is not None else None
    kwargs: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        kwargs["enable_thinking"] = False
    generate = GenerateRequest(
        prompts=(ChatPrompt(tuple(messages), kwargs, tools.specs),),
        prompt_param="input",
        sampling=sampling,
        tool_choice=_parse_choice(fields, tools),
        response_format=_parse_format(fields),
        format_param="text.format.schema",
        identity=identity,
    )
    return generate, tools


def _parse_choice(fields: InputTokensBody, tools: ToolTable) -> ToolChoice:
    value = fields.tool_choice
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        namespace = value.get("namespace")
        value = {**value, "name": joined_name(value["name"], namespace if isinstance(namespace, str) else None)}
    return parse_tool_choice(value, tools.specs, parallel=fields.parallel_tool_calls is not False)


def _parse_format(fields: InputTokensBody) -> ResponseFormat:
    value = fields.text.format if fields.text is not None else None
    if value is None:
        return TextFormat()
    form = object_field(value, "text.format")
    if form.get("type") == "json_schema":
        return parse_json_schema(form.get("schema"), "text.format.schema", form.get("name"))
    if form.get("type") == "grammar":
        raise InvalidRequestError("text.format.type: grammar is not known", param="text.format.type")
    return parse_response_format(form, "text.format")


def _echo(fields: ResponsesBody) -> dict[str, Any]:
    reasoning = fields.reasoning
    return {
        "background": False,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata if isinstance(fields.metadata, dict) else {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "service_tier": "default",
        # Nothing is ever kept, whatever was asked for.
        "store": False,
        "temperature": 1.0 if fields.temperature is None else fields.temperature,
        "text": {"format": (fields.text.format if fields.text else None) or {"type": "text"}},
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": fields.tools or [],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "truncation": "disabled",
        "user": fields.user if isinstance(fields.user, str) else None,
    }

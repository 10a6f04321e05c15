"""Tools, tool choice and the form of the answer, as the OpenAI dialects write them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.errors import UnsupportedParameterError
from agentserve.text.tools.spec import (
    ChoiceFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    LarkFormat,
    RegexFormat,
    ResponseFormat,
    TextFormat,
    ToolChoice,
    ToolMode,
    ToolSpec,
)

logger = logging.getLogger(__name__)
MAX_NAME_LENGTH = 256
_skipped_types_seen: set[str] = set()
_MAX_TYPES_SEEN = 64


def text_field(value: Any, param: str, *, default: str | None = None) -> str:
    """Raises InvalidRequestError for anything but a string; null is the default, if there is one."""
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param}: must be a string", param=param)
    return value


def object_field(value: Any, param: str) -> Mapping[str, Any]:
    """Raises InvalidRequestError for anything but an object."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{param}: must be an object", param=param)
    return value


def parse_function(function: Any, param: str) -> ToolSpec:
    """A function with `name`, `description`, `parameters` and `strict`. Raises InvalidRequestError."""
    fields = object_field(function, param)
    name = text_field(fields.get("name"), f"{param}.name")
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise InvalidRequestError(f"{param}.name: must have 1 to {MAX_NAME_LENGTH} characters", param=f"{param}.name")
    parameters = fields.get("parameters")
    return ToolSpec(
        name,
        text_field(fields.get("description"), f"{param}.description", default=""),
        None if parameters is None else object_field(parameters, f"{param}.parameters"),
        strict=fields.get("strict") is True,
    )


def skip_tool(kind: Any, param: str) -> None:
    """Says once that a kind of tool is not offered to the model: those run at the provider, not at the client."""
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{param}.type: must be a string", param=f"{param}.type")
    if kind not in _skipped_types_seen and len(_skipped_types_seen) < _MAX_TYPES_SEEN:
        _skipped_types_seen.add(kind)
        logger.warning("tools of type %.64r do not exist here; the model is not told of them", kind)


def check_names(tools: Sequence[ToolSpec], param: str = "tools") -> tuple[ToolSpec, ...]:
    """Raises InvalidRequestError for two tools of one name."""
    names = set()
    for tool in tools:
        if tool.name in names:
            raise InvalidRequestError(f"{param}: two tools have the name {tool.name[:64]!r}", param=param)
        names.add(tool.name)
    return tuple(tools)


def parse_chat_tools(tools: Sequence[Any] | None) -> tuple[ToolSpec, ...]:
    """The tools of `/v1/chat/completions`. Raises InvalidRequestError."""
    parsed = []
    for index, tool in enumerate(tools or ()):
        param = f"tools[{index}]"
        kind = object_field(tool, param).get("type", "function")
        if kind == "function":
            parsed.append(parse_function(tool.get("function"), f"{param}.function"))
        else:
            skip_tool(kind, param)
    return check_names(parsed)


def make_choice(
    mode: str, name: str | None, tools: Sequence[ToolSpec], *, parallel: bool, param: str = "tool_choice"
) -> ToolChoice:
    """`mode` in OpenAI's words: auto, none, required, or named with `name`.

    Raises InvalidRequestError for a name that no tool has, and for a call that must be made without any tools.
    """
    if mode in ("required", "named") and not tools:
        raise InvalidRequestError(f"{param}: there are no tools to choose from", param=param)
    if mode == "named" and name not in {tool.name for tool in tools}:
        raise InvalidRequestError(f"{param}: there is no tool {str(name)[:64]!r}", param=param)
    return ToolChoice(ToolMode(mode), name if mode == "named" else None, parallel)


def parse_tool_choice(value: Any, tools: Sequence[ToolSpec], *, parallel: bool) -> ToolChoice:
    """`tool_choice` of the OpenAI dialects. Raises InvalidRequestError."""
    if value is None:
        return ToolChoice(parallel=parallel)
    if value in ("auto", "none", "required"):
        return make_choice(value, None, tools, parallel=parallel)
    if isinstance(value, dict):
        kind = value.get("type")
        if kind in ("function", "custom"):
            fields = value.get(kind, value)  # the dialects differ in whether the name is nested
            name = text_field(fields.get("name") if isinstance(fields, dict) else None, "tool_choice.name")
            return make_choice("named", name, tools, parallel=parallel)
        if kind == "allowed_tools":
            fields = value.get("allowed_tools", value)
            mode = fields.get("mode") if isinstance(fields, dict) else None
            if mode in ("auto", "required"):
                return make_choice(mode, None, tools, parallel=parallel)
        elif isinstance(kind, str):
            skip_tool(kind, "tool_choice")
            return ToolChoice(parallel=parallel)
    raise InvalidRequestError('tool_choice: must be "auto", "none", "required" or name a tool', param="tool_choice")


# ---- the form of the answer ----


def parse_json_schema(schema: Any, param: str, name: Any = "") -> JsonSchemaFormat:
    """Raises InvalidRequestError unless `schema` is an object or a boolean."""
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"{param}: must be a JSON Schema", param=param)
    return JsonSchemaFormat(schema, name if isinstance(name, str) else "")


def parse_response_format(value: Any, param: str = "response_format") -> ResponseFormat:
    """`response_format` of chat and completions. Raises InvalidRequestError."""
    if value is None:
        return TextFormat()
    fields = object_field(value, param)
    kind = fields.get("type")
    if kind == "text":
        return TextFormat()
    if kind == "json_object":
        # Some servers take a schema here, too.
        schema = fields.get("schema")
        return JsonObjectFormat() if schema is None else parse_json_schema(schema, f"{param}.schema")
    if kind == "json_schema":
        nested = object_field(fields.get("json_schema"), f"{param}.json_schema")
        return parse_json_schema(nested.get("schema"), f"{param}.json_schema.schema", nested.get("name"))
    raise InvalidRequestError(f'{param}.type: must be "text", "json_object" or "json_schema"', param=f"{param}.type")


_CONSTRAINTS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
}


def parse_constraints(body: Mapping[str, Any]) -> tuple[ResponseFormat, str]:
    """The fields with which other servers' clients constrain text; at most one of them may be set.

    The second value is the field that does, `response_format` if there is none.
    Raises InvalidRequestError or UnsupportedParameterError.
    """
    given = [(name, kind, body[name]) for name, kind in _CONSTRAINTS.items() if body.get(name) is not None]
    structured = body.get("structured_outputs")
    if structured is not None:
        fields = object_field(structured, "structured_outputs")
        given += [
            (f"structured_outputs.{kind}", kind, fields[kind])
            for kind in ("json", "regex", "choice", "grammar")
            if fields.get(kind) is not None
        ]
        if fields.get("structural_tag") is not None:
            raise UnsupportedParameterError(
                "structured_outputs.structural_tag: is not supported", param="structured_outputs.structural_tag"
            )
    if body.get("response_format") is not None:
        given.append(("response_format", "response_format", body["response_format"]))
    if len(given) > 1:
        raise InvalidRequestError(f"{given[1][0]}: {given[0][0]} constrains the answer already", param=given[1][0])
    return (_parse_constraint(*given[0]), given[0][0]) if given else (TextFormat(), "response_format")


def _parse_constraint(param: str, kind: str, value: Any) -> ResponseFormat:
    if kind == "response_format":
        return parse_response_format(value)
    if kind == "json":
        return parse_json_schema(value, param)
    if kind == "regex":
        return RegexFormat(text_field(value, param))
    if kind == "grammar":
        return LarkFormat(text_field(value, param))
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InvalidRequestError(f"{param}: must be a list of strings", param=param)
    return ChoiceFormat(tuple(value))

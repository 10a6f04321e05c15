"""What calls look like in each tool-call format, as grammar: what it allows, the format's parser understands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentserve.errors import InvalidGrammarError
from agentserve.text.grammar import bare_text
from agentserve.text.grammar.bare_text import UnsupportedTextError
from agentserve.text.grammar.lark import LAZY, LarkBuilder, options_in_order
from agentserve.text.tools import hermes, mistral, qwen_xml
from agentserve.text.tools.types import property_types, resolve


@dataclass(frozen=True, slots=True)
class CallTool:
    """A tool whose schema is checked."""

    name: str
    parameters: Mapping[str, Any]
    """An object schema."""
    strict: bool
    param: str
    """The field of the request to blame."""


@dataclass(frozen=True, slots=True)
class CallRules:
    """How calls are put together. All but `trigger` and `first` are expressions."""

    call: str
    """One call, behind its trigger."""
    separator: str
    trigger: str = ""
    """The text that leads to a call, anywhere in an answer. Empty: an answer has calls from its start, or none."""
    opening: str = ""
    closing: str = ""
    """Around all calls, behind one trigger. Both or none."""
    first: str = ""
    """Without a trigger: the character that an answer with calls starts with."""


def hermes_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    start, end = '\n{"name": ', "}\n" + hermes.CLOSE
    call = _one_of(builder, [_json_call(builder, tool, start, "arguments", end) for tool in tools])
    return CallRules(call, json.dumps("\n"), trigger=hermes.OPEN)


def llama_json_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    call = _one_of(builder, [_json_call(builder, tool, '{"name": ', "parameters", "}") for tool in tools])
    return CallRules(call, json.dumps("; "), first="{")


def mistral_array_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    call = _one_of(builder, [_json_call(builder, tool, '{"name": ', "arguments", "}") for tool in tools])
    return CallRules(call, json.dumps(", "), mistral.CALLS, opening=json.dumps("["), closing=json.dumps("]"))


def mistral_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    arguments = builder.literal(mistral.ARGS)
    calls = [f"{json.dumps(tool.name)} {arguments} {builder.json(tool.parameters)}" for tool in tools]
    return CallRules(_one_of(builder, calls), "", mistral.CALLS)


def pythonic_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    """Values are written as JSON, which the parser reads as well as Python."""
    calls = []
    for tool in tools:
        arguments = [
            (f"{json.dumps(name + '=')} {builder.json(schema)}", required)
            for name, schema, required in _properties(tool)
        ]
        calls.append(f'{json.dumps(tool.name + "(")} {options_in_order(builder, arguments, json.dumps(", "))} ")"')
    rules = CallRules(_one_of(builder, calls), json.dumps(", "), first="[")
    return replace(rules, opening=json.dumps("["), closing=json.dumps("]"))


def qwen_xml_calls(builder: LarkBuilder, tools: list[CallTool]) -> CallRules:
    calls = []
    for tool in tools:
        parameters = [
            _xml_parameter(builder, tool, name, schema, required) for name, schema, required in _properties(tool)
        ]
        start = json.dumps(f"\n{qwen_xml.FUNCTION}{tool.name}>\n")
        calls.append(" ".join([start, *parameters, json.dumps(f"{qwen_xml.FUNCTION_END}\n{qwen_xml.CLOSE}")]))
    return CallRules(_one_of(builder, calls), json.dumps("\n"), trigger=qwen_xml.OPEN)


def _one_of(builder: LarkBuilder, calls: list[str]) -> str:
    return builder.rule(" | ".join(builder.rule(call) for call in calls))


def _json_call(builder: LarkBuilder, tool: CallTool, start: str, key: str, end: str) -> str:
    head = f'{start}{json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f"{json.dumps(head)} {builder.json(tool.parameters)} {json.dumps(end)}"


# ---- formats that name each argument ----


def _properties(tool: CallTool) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, schema and whether it is required, of each property.

    Raises InvalidGrammarError for a strict tool whose arguments are not described property by property.
    """
    root = resolve(tool.parameters, tool.parameters)
    properties = root.get("properties", {})
    combined = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "minProperties"} & root.keys()
    if combined and tool.strict:
        raise InvalidGrammarError(
            f"{tool.param}: {min(combined)} is not supported at the top of a strict schema by the model's call format",
            param=tool.param,
        )
    required = set(root.get("required", ()))
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return [
        (name, {**shared, **schema} if isinstance(schema, Mapping) else {}, name in required)
        for name, schema in properties.items()
    ]


def _xml_parameter(builder: LarkBuilder, tool: CallTool, name: str, schema: Mapping[str, Any], required: bool) -> str:
    value = _xml_value(builder, tool, name, schema)
    parameter = f"{json.dumps(f'{qwen_xml.PARAMETER}{name}>' + chr(10))} {value} {json.dumps(chr(10))}"
    return builder.rule(parameter) if required else f"{builder.rule(parameter)}?"


def _xml_value(builder: LarkBuilder, tool: CallTool, name: str, schema: Mapping[str, Any]) -> str:
    """A value and its end: bare text for strings, JSON for everything else."""
    types = property_types(tool.parameters, name)
    if "string" not in types:
        return f"{builder.json(schema)} {json.dumps(bare_text.END)}"
    try:
        return builder.terminal(bare_text.value_and_end(schema, types), LAZY)
    except UnsupportedTextError as error:
        if tool.strict:
            raise InvalidGrammarError(
                f"{tool.param}: {error} is not supported for text by the model's call format (in the schema at "
                f"/properties/{name})",
                param=tool.param,
            ) from None
    return builder.terminal(bare_text.value_and_end({}, types), LAZY)


CALL_RULES: dict[str, Callable[[LarkBuilder, list[CallTool]], CallRules]] = {
    "hermes": hermes_calls,
    "qwen3_coder": qwen_xml_calls,
    "llama3_json": llama_json_calls,
    "llama_pythonic": pythonic_calls,
    "mistral": mistral_calls,
    "mistral_array": mistral_array_calls,
}
"""By the name of the tool-call format."""

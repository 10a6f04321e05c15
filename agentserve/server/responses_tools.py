"""The tools of `/v1/responses`: functions, free-form tools and namespaces, all as functions to the model."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.server.tool_fields import check_names, object_field, parse_function, skip_tool, text_field
from agentserve.text.tools.spec import ToolSpec

_SEALED = "agentserve-1."


@dataclass(frozen=True, slots=True)
class ToolOrigin:
    """What a tool is to the client."""

    name: str
    namespace: str | None = None
    is_custom: bool = False
    """Its input is free text. The model is told of a function with one string, `input`."""


@dataclass(frozen=True, slots=True)
class ToolTable:
    """The tools of one request."""

    specs: tuple[ToolSpec, ...]
    origins: Mapping[str, ToolOrigin]
    """By the name that the model knows."""

    def origin(self, name: str) -> ToolOrigin:
        """A name that no tool has is one that the model has made up: the client will say so."""
        return self.origins.get(name) or ToolOrigin(name)


def parse_tools(tools: list[Any] | None) -> ToolTable:
    """Raises InvalidRequestError. Tools that run at the provider are left out."""
    specs: list[ToolSpec] = []
    origins: dict[str, ToolOrigin] = {}
    _add_tools(tools or [], "tools", None, specs, origins)
    return ToolTable(check_names(specs), origins)


def joined_name(name: str, namespace: str | None) -> str:
    """The name that the model knows: namespace and name with two underscores between them."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _add_tools(
    tools: list[Any], param: str, namespace: str | None, specs: list[ToolSpec], origins: dict[str, ToolOrigin]
) -> None:
    for index, tool in enumerate(tools):
        place = f"{param}[{index}]"
        fields = object_field(tool, place)
        kind = fields.get("type")
        if kind == "namespace" and namespace is None:
            name = text_field(fields.get("name"), f"{place}.name")
            nested = fields.get("tools")
            _add_tools(nested if isinstance(nested, list) else [], f"{place}.tools", name, specs, origins)
            continue
        if kind == "function":
            spec = parse_function(fields.get("function", fields), place)
        elif kind == "custom":
            spec = _parse_custom(fields.get("custom", fields), place)
        else:
            skip_tool(kind, place)
            continue
        name = joined_name(spec.name, namespace)
        specs.append(ToolSpec(name, spec.description, spec.parameters, spec.strict))
        origins[name] = ToolOrigin(spec.name, namespace, is_custom=kind == "custom")


def _parse_custom(fields: Any, param: str) -> ToolSpec:
    spec = parse_function({**object_field(fields, param), "parameters": None}, param)
    description = spec.description
    form = fields.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        # The client checks the grammar; the model can only be told of it.
        description += f"\n\nThe input follows this {form.get('syntax', 'grammar')} grammar:\n{form['definition']}"
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string", "description": "The whole input of the tool, as plain text."}},
        "required": ["input"],
        "additionalProperties": False,
    }
    return ToolSpec(spec.name, description, parameters)


def custom_arguments(text: str) -> str:
    """The input of a free-form tool as the arguments of a function."""
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The reverse. What is no such object is the input itself."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def seal(reasoning: str) -> str:
    """Thoughts in the form of the field `encrypted_content`: some clients send nothing else of them back."""
    return _SEALED + base64.urlsafe_b64encode(reasoning.encode()).decode()


def unseal(sealed: Any) -> str:
    """Empty for what another server has made."""
    if not isinstance(sealed, str) or not sealed.startswith(_SEALED):
        return ""
    try:
        return base64.urlsafe_b64decode(sealed[len(_SEALED) :]).decode()
    except (binascii.Error, ValueError):
        return ""

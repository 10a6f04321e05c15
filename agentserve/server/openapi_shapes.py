"""What the OpenAPI document says about the parts of a body that parsers read themselves.

Those fields take `Any`, because their parsers can name the part at fault, and accept more than is written here: forms
that only some clients send. What is written here is answered.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, WithJsonSchema

Schema = dict[str, Any]


def described(schema: Schema) -> WithJsonSchema:
    """An annotation: this is what the document says; null is the same as nothing."""
    return WithJsonSchema({"anyOf": [schema, {"type": "null"}]})


def refused() -> WithJsonSchema:
    """An annotation: anything but null is refused."""
    return WithJsonSchema({"type": "null", "description": "Not supported here, and therefore refused."})


def limits(**keywords: float) -> Any:
    """An annotation: limits of a number that are checked later, in words that name the field."""
    names = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum"}
    return Field(json_schema_extra={names[name]: value for name, value in keywords.items()})


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema, **keywords: int) -> Schema:
    return {"type": "array", "items": items, **keywords}


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _tagged(kind: str, *required: str, **properties: Schema) -> Schema:
    return _object("type", *required, type={"const": kind}, **properties)


_STRING: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"]
JSON_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": _TYPES},
        "properties": {"type": "object", "additionalProperties": {"type": "object"}},
    },
    "description": "A JSON Schema. What cannot be enforced is refused.",
}
_PARAMETERS = JSON_SCHEMA | {"properties": {**JSON_SCHEMA["properties"], "type": {"const": "object"}}}

# ---- OpenAI chat ----

_FUNCTION = _object("name", name=_NAME, description=_STRING, parameters=_PARAMETERS, strict={"type": "boolean"})
_TEXT = _any_of(_STRING, _list(_tagged("text", "text", text=_STRING)))
_CALL = _object(
    "id", "function", id=_STRING, type={"const": "function"}, function=_object("name", name=_NAME, arguments=_STRING)
)
CHAT_MESSAGES = _list(
    _any_of(
        _object("role", "content", role={"enum": ["system", "developer", "user"]}, content=_TEXT),
        _object(
            "role",
            role={"const": "assistant"},
            content=_any_of(_TEXT, {"type": "null"}),
            reasoning_content=_STRING,
            tool_calls=_list(_CALL),
        ),
        _object("role", "content", role={"const": "tool"}, content=_TEXT, tool_call_id=_STRING),
    ),
    minItems=1,
)
CHAT_TOOLS = _list(_tagged("function", "function", function=_FUNCTION))
CHAT_TOOL_CHOICE = _any_of(
    {"enum": ["auto", "none", "required"]}, _tagged("function", "function", function=_object("name", name=_NAME))
)
RESPONSE_FORMAT = _any_of(
    _tagged("text"),
    _tagged("json_object"),
    _tagged("json_schema", "json_schema", json_schema=_object("schema", name=_STRING, schema=JSON_SCHEMA)),
)
REGEX: Schema = _STRING | {"description": "A regular expression that the whole text matches."}
GRAMMAR: Schema = _STRING | {"description": "A context-free grammar in llguidance's variant of Lark's notation."}
CHOICES = _list({"type": "string", "minLength": 1}, minItems=1)
STRUCTURED_OUTPUTS = _object(json=JSON_SCHEMA, regex=REGEX, choice=CHOICES, grammar=GRAMMAR) | {"maxProperties": 1}
NO_FUNCTIONS = _list({}, maxItems=0) | {"description": "The older form of tools; use `tools`."}
ONLY_TEXT = _list({"const": "text"})
NO_SUFFIX: Schema = {"const": "", "description": "Filling in the middle is not supported."}
_TOKENS = _list({"type": "integer", "minimum": 0}, minItems=1)
PROMPT = _any_of(_STRING, _list(_STRING, minItems=1), _TOKENS, _list(_TOKENS, minItems=1))
LOGIT_BIAS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
TOKEN_IDS = _list({"type": "integer", "minimum": 0})

# ---- Anthropic ----

_TEXT_BLOCKS = _list(_tagged("text", "text", text=_STRING))
SYSTEM = _any_of(_STRING, _TEXT_BLOCKS)
_RESULT = _tagged(
    "tool_result",
    "tool_use_id",
    tool_use_id=_STRING,
    content=_any_of(_STRING, _TEXT_BLOCKS),
    is_error={"type": "boolean"},
)
_USE = _tagged("tool_use", "id", "name", "input", id=_STRING, name=_NAME, input={"type": "object"})
_THINKING = _tagged("thinking", "thinking", thinking=_STRING, signature=_STRING)
ANTHROPIC_MESSAGES = _list(
    _any_of(
        _object(
            "role", "content",
            role={"const": "user"}, content=_any_of(_STRING, _list(_any_of(_TEXT_BLOCKS["items"], _RESULT))),
        ),
        _object(
            "role", "content",
            role={"const": "assistant"},
            content=_any_of(_STRING, _list(_any_of(_TEXT_BLOCKS["items"], _THINKING, _USE))),
        ),
        _object("role", "content", role={"const": "system"}, content=SYSTEM),
    ),
    minItems=1,
)  # fmt: skip
ANTHROPIC_TOOLS = _list(_object("name", "input_schema", name=_NAME, description=_STRING, input_schema=_PARAMETERS))
ANTHROPIC_TOOL_CHOICE = _any_of(
    _object("type", type={"enum": ["auto", "any", "none"]}, disable_parallel_tool_use={"type": "boolean"}),
    _tagged("tool", "name", name=_NAME),
)
THINKING = _object("type", type={"enum": ["enabled", "disabled", "adaptive"]}, budget_tokens={"type": "integer"})
OUTPUT_FORMAT = _tagged("json_schema", "schema", schema=JSON_SCHEMA)

# ---- OpenAI responses ----

_PARTS = _any_of(_STRING, _list(_object("type", "text", type={"enum": ["input_text", "output_text"]}, text=_STRING)))
RESPONSES_INPUT = _any_of(
    _STRING,
    _list(
        _any_of(
            _object(
                "role",
                "content",
                type={"const": "message"},
                role={"enum": ["user", "assistant", "system", "developer"]},
                content=_PARTS,
            ),
            _tagged("function_call", "call_id", "name", "arguments", call_id=_STRING, name=_NAME, arguments=_STRING),
            _tagged("function_call_output", "call_id", "output", call_id=_STRING, output=_PARTS),
        ),
        minItems=1,
    ),
)
RESPONSES_TOOLS = _list(
    _any_of(
        _tagged(
            "function", "name", name=_NAME, description=_STRING, parameters=_PARAMETERS, strict={"type": "boolean"}
        ),
        _tagged("custom", "name", name=_NAME, description=_STRING),
        _tagged("namespace", "name", "tools", name=_NAME, tools=_list(_tagged("function", "name", name=_NAME))),
        _tagged("web_search"),
    )
)
RESPONSES_TOOL_CHOICE = _any_of({"enum": ["auto", "none", "required"]}, _tagged("function", "name", name=_NAME))
TEXT_FORMAT = _any_of(
    _tagged("text"), _tagged("json_object"), _tagged("json_schema", "schema", name=_STRING, schema=JSON_SCHEMA)
)
NOT_IN_BACKGROUND: Schema = {"const": False}

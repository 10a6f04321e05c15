"""Schemas of the kinds that public JSON Schema test suites have, and whether they are to be accepted or refused."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: bool = True, **properties: Any) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(properties)} if required else schema


_SHORT: Schema = {"type": "string", "maxLength": 8}
_DEEP: Schema = _SHORT
for _ in range(12):
    _DEEP = _object(child=_DEEP)
_TREE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": _object(
            value={"type": "integer", "minimum": 0, "maximum": 99},
            children={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
        ),
        "leaf": _object(value={"type": "integer", "minimum": 0, "maximum": 9}),
    },
}

ACCEPTED: dict[str, Schema] = {
    "object": _object(name=_SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "optional properties": _object(required=False, a=_SHORT, b={"type": "boolean"}),
    "const string": _object(kind={"const": "fixed"}),
    "const number": _object(kind={"const": 3}),
    "const null": _object(kind={"const": None}),
    "const object": _object(kind={"const": {"a": [1, 2]}}),
    "enum": _object(unit={"enum": ["c", "f"]}),
    "enum of mixed types": _object(value={"enum": ["a", 1, 2.5, True, None, {"b": []}]}),
    "boolean": _object(flag={"type": "boolean"}),
    "null": _object(nothing={"type": "null"}),
    "type list": _object(value={"type": ["integer", "null"], "maximum": 9, "minimum": 0}),
    "anyOf": _object(value={"anyOf": [_SHORT, {"type": "boolean"}]}),
    "anyOf objects": _object(value={"anyOf": [_object(a={"type": "boolean"}), _object(b={"type": "null"})]}),
    "oneOf disjoint types": _object(value={"oneOf": [_SHORT, {"type": "boolean"}]}),
    "oneOf by a constant": _object(
        value={"oneOf": [_object(kind={"const": "a"}, x=_SHORT), _object(kind={"const": "b"}, y={"type": "boolean"})]}
    ),
    "allOf of bounds": _object(value={"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]}),
    "ref to definitions": {**_object(value={"$ref": "#/definitions/short"}), "definitions": {"short": _SHORT}},
    "ref to defs": {**_object(value={"$ref": "#/$defs/short"}), "$defs": {"short": _SHORT}},
    "ref to a property": _object(first=_SHORT, second={"$ref": "#/properties/first"}),
    "ref with an escaped pointer": {**_object(value={"$ref": "#/$defs/a~1b"}), "$defs": {"a/b": _SHORT}},
    "ref of a ref": {
        **_object(value={"$ref": "#/$defs/one"}),
        "$defs": {"one": {"$ref": "#/$defs/two"}, "two": {"type": "boolean"}},
    },
    "tree": _TREE,
    "recursive list": {
        "$ref": "#/$defs/list",
        "$defs": {
            "list": {
                **_object(head={"type": "boolean"}, tail={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}),
            }
        },
    },
    "pattern": _object(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "pattern without anchors": _object(code={"type": "string", "pattern": "[0-9]{2}", "maxLength": 6}),
    "pattern with classes": _object(code={"type": "string", "pattern": r"^\w{1,5}\s\d{2}$"}),
    "length bounds": _object(code={"type": "string", "minLength": 3, "maxLength": 5}),
    "format date": _object(day={"type": "string", "format": "date"}),
    "format date-time": _object(at={"type": "string", "format": "date-time"}),
    "format uuid": _object(key={"type": "string", "format": "uuid"}),
    "format ipv4": _object(host={"type": "string", "format": "ipv4"}),
    "integer bounds": _object(value={"type": "integer", "minimum": -5, "maximum": 5}),
    "exclusive bounds": _object(value={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}),
    "number bounds": _object(value={"type": "number", "minimum": 0, "maximum": 1}),
    "multipleOf": _object(value={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "array bounds": _object(items={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}),
    "empty array": _object(items={"type": "array", "maxItems": 0}),
    "array of objects": _object(rows={"type": "array", "items": _object(a={"type": "boolean"}), "maxItems": 2}),
    "prefixItems": _object(
        pair={"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2}
    ),
    "prefixItems and items": _object(
        row={"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "maxItems": 3}
    ),
    "additionalProperties schema": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "deep": _DEEP,
    "unicode keys": _object(**{"größe": {"type": "boolean"}, "名前": _SHORT, "😀": {"type": "null"}}),
    "keys with quotes": _object(**{'a"b': {"type": "boolean"}, "c\\d": {"type": "null"}, "e\nf": {"type": "null"}}),
    "unicode constants": _object(value={"enum": ["naïve", "東京", "\u2028", '"quoted"', "a\\b"]}),
    "top-level array": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    "top-level enum": {"enum": ["yes", "no"]},
    "top-level boolean": {"type": "boolean"},
    "annotations": _object(value={**_SHORT, "title": "t", "description": "d", "default": "x", "examples": ["y"]}),
    "unknown keyword": _object(value={**_SHORT, "x-vendor": 1}),
    "OpenAPI nullable": _object(value={"type": "boolean", "nullable": True}),
    "many properties": _object(**{f"p{i}": {"type": "boolean"} for i in range(40)}),
}
"""Answers must fit them."""

REFUSED: dict[str, Any] = {
    "no such type": _object(value={"type": "strin"}),
    "type is a number": {"type": 12},
    "properties is a list": {"type": "object", "properties": []},
    "required is a string": {"type": "object", "properties": {}, "required": "a"},
    "reference to nothing": _object(value={"$ref": "#/$defs/nope"}),
    "remote reference": _object(value={"$ref": "https://example.com/schema.json"}),
    "dynamic reference": _object(value={"$dynamicRef": "#node"}),
    "not": _object(value={"not": {"type": "string"}}),
    "if and then": {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "type": "object"},
    "uniqueItems": _object(items={"type": "array", "uniqueItems": True, "items": _SHORT}),
    "contains": _object(items={"type": "array", "contains": {"const": 1}}),
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "oneOf that overlaps": _object(value={"oneOf": [{"type": "string", "minLength": 1}, {"type": "string"}]}),
    "look-ahead": _object(value={"type": "string", "pattern": "^(?=a).*$"}),
    "back-reference": _object(value={"type": "string", "pattern": r"^(a)\1$"}),
    "unknown format": _object(value={"type": "string", "format": "zodiac"}),
    "false": _object(value=False),
    "empty enum": _object(value={"enum": []}),
    "allOf that contradicts itself": _object(value={"allOf": [{"type": "string"}, {"type": "number"}]}),
    "bounds that cross": _object(value={"type": "integer", "minimum": 3, "maximum": 2}),
    "length bounds that cross": _object(value={"type": "string", "minLength": 3, "maxLength": 2}),
    "schema is a list": [1],
}
"""They contradict themselves, are no schemas, or use what cannot be enforced."""

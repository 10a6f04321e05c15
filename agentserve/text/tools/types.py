"""Values that models write as bare text, by the types that a tool's schema declares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentserve.text.tools.pythonic import literal_to_json

_MAX_REFERENCES = 32
_TYPE_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null", int: "integer"}


def property_types(parameters: Mapping[str, Any] | None, key: str) -> frozenset[str]:
    """JSON types that the property `key` may have; `string` if the schema does not say."""
    if parameters is None:
        return frozenset({"string"})
    root = resolve(parameters, parameters)
    properties = root.get("properties") if isinstance(root, Mapping) else None
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(schema, parameters, 0)) or frozenset({"string"})


def resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    """Follows `$ref`s within the schema `root`; a reference that leads nowhere stays as it is."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        target: Any = root
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        if target is None:
            return schema
        schema = target
    return schema


def coerce(text: str, types: frozenset[str]) -> str:
    """`text` as JSON of one of `types`; as a string if it is of none of them."""
    stripped = text.strip()
    if "null" in types and stripped in {"null", "None", ""}:
        return "null"
    if "boolean" in types and stripped.lower() in {"true", "false"}:
        return stripped.lower()
    value = literal_to_json(stripped)
    if value is not None and _type_of(json.loads(value)) & types:
        return value
    return json.dumps(text, ensure_ascii=False)


def _type_of(value: Any) -> frozenset[str]:
    if isinstance(value, float):
        return frozenset({"number"})
    if isinstance(value, int) and not isinstance(value, bool):
        return frozenset({"number", "integer"})
    return frozenset({_TYPE_NAMES[type(value)]})


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    schema = resolve(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return set()
    stated = schema.get("type")
    if isinstance(stated, str):
        return {stated}
    if isinstance(stated, list):
        return {name for name in stated if isinstance(name, str)}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if "const" not in schema else [schema["const"]]
        return set().union(*(_type_of(value) for value in values if not isinstance(value, tuple)))
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else []:
            found |= _types(branch, root, depth + 1)
    return found

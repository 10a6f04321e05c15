"""JSON Schemas before they become grammars, and where one is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agentserve.errors import InvalidGrammarError

_MAX_CHECKS = 256
"""How many parts of a schema are looked at to find the one that is at fault."""
_UNSUPPORTED = frozenset({"dependencies", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy"})
"""Keywords that restrict values and that llguidance passes over in silence."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
_OTHER_OBJECT_RULES = frozenset({"patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "unevaluatedProperties"})


def check_schema(schema: Any, param: str) -> Mapping[str, Any]:
    """The schema as an object. Raises InvalidGrammarError for what is no schema, and for keywords that would be passed
    over."""
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise InvalidGrammarError(f"{param} must be a JSON Schema, an object", param=param)
    try:
        for pointer, part in _parts(schema):
            unsupported = _UNSUPPORTED & part.keys()
            if unsupported:
                raise InvalidGrammarError(_at(param, pointer, f"{min(unsupported)} is not supported"), param=param)
    except RecursionError:
        raise InvalidGrammarError(f"{param}: the schema is nested too deeply", param=param) from None
    return schema


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without properties that it does not name, where it leaves open whether there may be others.

    What fits the result fits the schema; a model that may invent properties does not stop in time.
    """
    if not schema.get("properties") or "additionalProperties" in schema or _OTHER_OBJECT_RULES & schema.keys():
        return schema
    properties = schema["properties"]
    required = schema.get("required", ())
    if (
        not isinstance(properties, Mapping)
        or not isinstance(required, Sequence)
        or not set(required) <= set(properties)
    ):
        return schema
    if schema.get("minProperties", 0) > len(properties):
        return schema
    return {**schema, "additionalProperties": False}


def locate(schema: Mapping[str, Any], param: str, problem: str, check: Callable[[Mapping[str, Any]], str]) -> str:
    """A sentence that says where in `schema` the `problem` is: in the innermost part that has it.

    `check` gives the problem of a schema, empty if it has none.
    """
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    best = ""
    for number, (pointer, part) in enumerate(_parts(schema)):
        if number == _MAX_CHECKS:
            break
        if not pointer.startswith(best) or not pointer or _refers_elsewhere(part):
            continue
        inner = check({**shared, **part})
        if inner:
            best, problem = pointer, inner
    return _at(param, best, problem)


def _refers_elsewhere(part: Mapping[str, Any]) -> bool:
    """Whether a part refers to what it does not hold itself; it cannot be judged alone."""
    for _, inner in _parts(part):
        reference = inner.get("$ref")
        if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
            return True
    return False


def _at(param: str, pointer: str, problem: str) -> str:
    return f"{param}: {' '.join(problem.split())} (in the schema at {pointer or '/'})"


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All schemas within `schema`, itself included, with their JSON pointers; outer ones first."""
    open_parts: list[tuple[str, Any]] = [("", schema)]
    for pointer, part in open_parts:  # grows while it is walked through
        if not isinstance(part, Mapping):
            continue
        yield pointer, part
        for key in _MAPS:
            children = part.get(key)
            if isinstance(children, Mapping):
                open_parts += [(f"{pointer}/{key}/{_escape(name)}", child) for name, child in children.items()]
        for key in _LISTS:
            children = part.get(key)
            if isinstance(children, Sequence) and not isinstance(children, str):
                open_parts += [(f"{pointer}/{key}/{index}", child) for index, child in enumerate(children)]
        open_parts += [(f"{pointer}/{key}", part[key]) for key in _SINGLE if key in part]


def _escape(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")

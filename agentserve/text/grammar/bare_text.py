"""Patterns of values that a call format writes as bare text, without quotes: those of Qwen3-Coder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentserve.text.grammar.lark import TEXT, escape_regex
from agentserve.text.tools import qwen_xml
from agentserve.text.tools.types import coerce, resolve

END = "\n" + qwen_xml.PARAMETER_END
"""What follows a value."""
_ANNOTATIONS = frozenset({"type", "title", "description", "default", "examples", "deprecated", "nullable"})
_DEFINITIONS = frozenset({"$defs", "definitions", "$ref"})
_RULES = frozenset({"const", "enum", "anyOf", "oneOf", "minLength", "maxLength", "pattern"})
_NO_END = " & ".join(f"~/(?s:.*){escape_regex(end)}(?s:.*)/" for end in qwen_xml.VALUE_ENDS)
"""A value in which there is no text that its reader takes for its end."""


class UnsupportedTextError(Exception):
    """The keyword of a schema that cannot be enforced for bare text; never leaves the grammar's code."""


def value_and_end(schema: Mapping[str, Any], types: frozenset[str]) -> str:
    """A pattern of a value of one of `types`, one of which is `string`, and what follows it.

    Args:
        schema: that of the value, with the definitions that it refers to.
        types: JSON types that it may have, as the reader of the value sees them.

    Raises UnsupportedTextError for a keyword that restricts values and cannot be enforced.
    """
    return f"(({_pattern(schema, schema, types)}) & {_NO_END}) {json.dumps(END)}"


def _pattern(schema: Any, root: Mapping[str, Any], types: frozenset[str]) -> str:
    schema = resolve(schema, root)
    if not isinstance(schema, Mapping):
        raise UnsupportedTextError("a schema that is no object")
    rules = schema.keys() - _ANNOTATIONS - _DEFINITIONS
    if rules - _RULES:
        raise UnsupportedTextError(min(rules - _RULES))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return _one_of(values, types, alone=len(rules) == 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in rules:
            if len(rules) > 1 or not isinstance(schema[keyword], list):
                raise UnsupportedTextError(keyword)
            return " | ".join(f"({_pattern(branch, root, types)})" for branch in schema[keyword])
    stated = schema.get("type")
    names = {stated} if isinstance(stated, str) else set(stated or types)
    if not rules:
        return _of_types(names, types)
    if not names <= {"string", "null"}:
        raise UnsupportedTextError(min(rules))
    text = " & ".join([f"/{_unanchored(schema['pattern'])}/" if "pattern" in rules else TEXT, *_lengths(schema)])
    # A text that its reader takes for something else is none.
    text = " & ".join([text, *_not_read_as(types - {"string"})])
    return f"({text}) | {json.dumps('null')}" if "null" in names else text


def _of_types(names: set[str], types: frozenset[str]) -> str:
    """Values of a schema that says no more than its types, where those of all of the schema are `types`."""
    if "string" in names:
        # Whatever is written is a string or is read as something that is allowed as well.
        return TEXT if names == types else " & ".join([TEXT, *_not_read_as(types - names)])
    words = {"null": ["null"], "boolean": ["true", "false"]}
    if not names <= words.keys():
        raise UnsupportedTextError("a choice between text and " + " or ".join(sorted(names - words.keys())))
    return " | ".join(json.dumps(word) for name in sorted(names) for word in words[name])


def _not_read_as(types: frozenset[str]) -> list[str]:
    """Patterns that leave out what the reader takes for a value of one of `types` rather than for text."""
    patterns = []
    if "null" in types:
        patterns.append("~/(?s:\\s*)(null|None)?(?s:\\s*)/")
    if "boolean" in types:
        patterns.append("~/(?s:\\s*)((?i:true)|(?i:false))(?s:\\s*)/")
    others = types - {"null", "boolean"}
    if others:
        raise UnsupportedTextError("a choice between text and " + " or ".join(sorted(others)))
    return patterns


def _one_of(values: Any, types: frozenset[str], *, alone: bool) -> str:
    if not isinstance(values, list) or not values or not alone:
        raise UnsupportedTextError("enum")
    texts = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value)
        read = json.loads(json.dumps(text) if types == {"string"} else coerce(text, types))
        if read != value or isinstance(read, bool) != isinstance(value, bool):
            raise UnsupportedTextError("enum")
        texts.append(json.dumps(text))
    return " | ".join(texts)


def _lengths(schema: Mapping[str, Any]) -> list[str]:
    """Lengths count characters, which is what a pattern counts as well."""
    if not schema.keys() & {"minLength", "maxLength"}:
        return []
    return [f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/"]


def _unanchored(pattern: str) -> str:
    """A pattern that JSON Schema searches for anywhere in a text, as one of the whole text."""
    at_start, at_end, body = pattern.startswith("^"), _ends_with_anchor(pattern), pattern
    body = body[1:] if at_start else body
    body = body[:-1] if at_end else body
    if _has_anchors(body) or ((at_start or at_end) and _has_bare_choice(body)):
        raise UnsupportedTextError("a pattern with ^ or $ within it")
    before, behind = "" if at_start else "(?s:.*)", "" if at_end else "(?s:.*)"
    escaped = "".join({"/": "\\/", "\n": "\\n"}.get(text, text) for text, _ in _units(body))
    return f"{before}({escaped}){behind}"


def _ends_with_anchor(pattern: str) -> bool:
    units = list(_units(pattern))
    return bool(units) and units[-1] == ("$", 0)


def _has_anchors(pattern: str) -> bool:
    return any(text in ("^", "$") for text, depth in _units(pattern) if depth >= 0)


def _has_bare_choice(pattern: str) -> bool:
    return any(text == "|" and depth == 0 for text, depth in _units(pattern))


def _units(pattern: str) -> list[tuple[str, int]]:
    """The characters of a pattern, escaped ones with their backslash, each with how many groups it is in; -1: a class.

    A bracket that opens or ends a class or a group counts as outside of it.
    """
    units: list[tuple[str, int]] = []
    depth, in_class, at = 0, False, 0
    while at < len(pattern):
        text = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(text)
        if in_class:
            in_class = text != "]"
            units.append((text, -1))
            continue
        depth -= text == ")"
        units.append((text, depth))
        depth += text == "("
        in_class = text == "["
    return units

"""Writes grammars in llguidance's variant of Lark's notation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

TEXT = "/(?s:.*)/"
LAZY = "[lazy]"
"""Of a rule that ends as soon as it can."""
_REGEX_MEANING = frozenset("\\/.^$|?*+()[]{}-&~#")
_WHITESPACE = "( |\\n[ \\t]{0,40})?"
"""Between the tokens of JSON: what pretty-printers write, but bounded, or a model may write blanks for ever."""
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}


class LarkBuilder:
    """Collects rules; an expression is a string that may stand on the right side of a rule."""

    def __init__(self, special_id: Callable[[str], int | None]) -> None:
        """`special_id`: the id of a special token, None for text that is none. Special tokens are no text: a grammar
        has to name them by their ids."""
        self._special_id = special_id
        self._rules: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        """A new rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def literal(self, text: str) -> str:
        """Exactly `text`, which may be a special token."""
        token_id = self._special_id(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    def until(self, marker: str, also: str = "") -> str:
        """Any text up to and including the first `marker`; `also` is a pattern that all of it must fit."""
        token_id = self._special_id(marker)
        if token_id is not None:
            text = self.terminal(f"{TEXT} & {also}") if also else self.rule(TEXT)
            return self.rule(f"{text} <[{token_id}]>")
        if also:
            return self.terminal(f"/(?s:.*){escape_regex(marker)}/ & {also}", LAZY)
        return self.rule(TEXT, f"[suffix={json.dumps(marker)}]")

    def terminal(self, body: str, options: str = "") -> str:
        """A new rule that is one token of the grammar, so that `body` may combine patterns by `&`, `|` and `~`."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return self.rule(name, options)

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that fits `schema`."""
        return self.rule(f"%json {json.dumps(json_schema(schema))}")

    def build(self, start: str) -> str:
        """The grammar of the expression `start`."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, ""])


def escape_regex(text: str) -> str:
    """A pattern, for use between slashes, of exactly `text`."""
    shown = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(shown.get(character) or _escape(character) for character in text)


def _escape(character: str) -> str:
    return "\\" + character if character in _REGEX_MEANING else character


def json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our options, which a client must not change: `lenient` would switch checks off."""
    return {**schema, "x-guidance": _JSON_OPTIONS}


def options_in_order(builder: LarkBuilder, items: list[tuple[str, bool]], separator: str) -> str:
    """A list of `items`, each an expression and whether it must be there, in their order, with a separator between."""
    # `started` is the rest of the list behind an item, `fresh` the rest while there is none yet.
    started, fresh = '""', '""'
    for expression, required in reversed(items):
        behind = builder.rule(f"{separator} {expression} {started}")
        first = builder.rule(f"{expression} {started}")
        started_next = behind if required else builder.rule(f"{behind} | {started}")
        fresh = first if required else builder.rule(f"{first} | {fresh}")
        started = started_next
    return fresh

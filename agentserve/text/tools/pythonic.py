"""Llama 3.2 and 4: calls as a Python list, `[f(a=1), g(b="x")]`."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from agentserve.text.tools.parser import BufferedParser

TAGS = ("<|python_start|>", "<|python_tag|>")
_END_TAG = "<|python_end|>"
_NAME = r"[A-Za-z_][A-Za-z0-9_.\-]*"
_CALL = re.compile(rf"\s*({_NAME})\s*\(")
_CALL_BEGINNING = re.compile(rf"\s*({_NAME}\s*)?")
_KEYWORD = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*")
_KEYWORD_BEGINNING = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*\s*(=\s*)?)?")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser(BufferedParser):
    """A list of calls is recognized at the start of an answer, by the name of a known tool. Each argument is passed on
    when it is complete."""

    _markup = ""
    _keyword = ""
    _value: _LiteralScanner

    def _start(self) -> bool:
        self._markup += self._skip_space()
        if not self._buffer:
            if self._at_end:
                self._show(self._markup)
            return False
        for tag in TAGS:
            if self._buffer.startswith(tag):
                self._markup += self._take(len(tag))
                return True
        if self._may_become(*TAGS):
            return False
        if self._buffer[0] == "[":
            self._markup += self._take(1)
            self._state = self._expect_name
        else:
            self._to_text(self._markup)
        return True

    def _text(self) -> bool:
        self._show(self._take(len(self._buffer)))
        return False

    def _to_text(self, shown: str) -> None:
        self._show(shown)
        self._state = self._text

    def _expect_name(self) -> bool:
        call = _CALL.match(self._buffer)
        if call is None and not self._at_end and _CALL_BEGINNING.fullmatch(self._buffer):
            return False
        if call is None or call.group(1) not in self._tools:
            self._to_text(self._markup)
            return True
        self._take(call.end())
        self._begin_call(call.group(1))
        self._state = self._expect_argument
        return True

    def _expect_argument(self) -> bool:
        self._skip_space()
        if self._buffer.startswith(")"):
            self._take(1)
            self._add_arguments("}" if self._arguments else "{}")
            self._end_call()
            self._state = self._behind
            return True
        if self._arguments and self._buffer.startswith(","):
            self._take(1)
            return True
        keyword = _KEYWORD.match(self._buffer)
        if keyword is None or keyword.end() == len(self._buffer):
            if self._at_end or not _KEYWORD_BEGINNING.fullmatch(self._buffer):
                self._break_off("")
                return True
            return False
        self._keyword = keyword.group(1)
        self._markup = self._take(keyword.end())
        self._value = _LiteralScanner()
        self._state = self._in_value
        return True

    def _in_value(self) -> bool:
        scanner = self._value
        self._take(scanner.push(self._buffer))
        if not scanner.is_done:
            if self._at_end:
                self._break_off("")
            return self._at_end
        value = literal_to_json(scanner.text)
        if value is None:
            self._break_off(self._markup + scanner.text)
            return True
        opening = ", " if self._arguments else "{"
        self._add_arguments(f"{opening}{json.dumps(self._keyword)}: {value}")
        self._state = self._expect_argument
        return True

    def _break_off(self, shown: str) -> None:
        self._end_call(complete=False)
        if self._at_end and not shown:
            self._take(len(self._buffer))  # a part of the call that was cut off
        self._to_text(shown)

    def _behind(self) -> bool:
        self._markup = self._skip_space()
        if self._buffer.startswith(","):
            self._markup += self._take(1)
            self._state = self._expect_name
        elif self._buffer.startswith("]"):
            self._take(1)
            self._state = self._behind_list
        elif not self._buffer:
            return False
        else:
            self._to_text(self._markup)
        return True

    def _behind_list(self) -> bool:
        self._skip_space()
        if not self._buffer or self._may_become(_END_TAG):
            return False
        self._buffer = self._buffer.removeprefix(_END_TAG)
        self._state = self._text
        return True


class _LiteralScanner:
    """Finds the end of a Python or JSON value: a comma or a closing bracket outside of strings and brackets."""

    def __init__(self) -> None:
        self.is_done = False
        self._taken: list[str] = []
        self._closing: list[str] = []
        self._quote = ""
        self._is_escaped = False

    @property
    def text(self) -> str:
        return "".join(self._taken)

    def push(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        for position, character in enumerate(text):
            if not self._quote and not self._closing and character in ",)]}":
                self.is_done = True
                self._taken.append(text[:position])
                return position
            self._look_at(character)
        self._taken.append(text)
        return len(text)

    def _look_at(self, character: str) -> None:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "\"'":
            self._quote = character
        elif character in _CLOSING:
            self._closing.append(_CLOSING[character])
        elif self._closing and character == self._closing[-1]:
            self._closing.pop()


def literal_to_json(text: str) -> str | None:
    """A value in JSON's or in Python's notation as JSON; None if it is neither."""
    try:
        return json.dumps(json.loads(text, parse_constant=_refuse), ensure_ascii=False)
    except (ValueError, RecursionError):
        pass  # it may still be Python's notation
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            tree = ast.parse(text.strip(), mode="eval")
        return json.dumps(_value_of(tree.body), ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _value_of(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value_of(item) for item in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {_key_of(key): _value_of(value) for key, value in pairs}
    raise ValueError("no literal")


def _key_of(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no key of an object")
